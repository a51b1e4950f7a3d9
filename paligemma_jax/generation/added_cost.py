"""What a constraint or an observer costs, measured beside decoding without it."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from paligemma_jax.generation.constraints import Constraint
from paligemma_jax.generation.decode import Observer, decode, prefill
from paligemma_jax.generation.sampling import Greedy, Sampler
from paligemma_jax.models.paligemma import PaliGemma

PROMPT = 16  # tokens
NO_EOS = -1  # both run for equally many steps


@dataclasses.dataclass(frozen=True)
class AddedCost:
    """Seconds a decode step, every run: without, and with what was asked about."""

    plain: tuple[float, ...]
    added: tuple[float, ...]

    @property
    def median(self) -> float:
        """Added share of the time by medians: 0.05 is 5 %."""
        return statistics.median(self.added) / statistics.median(self.plain) - 1

    @property
    def minimum(self) -> float:
        """The same by the fastest runs, which a busy machine disturbs least."""
        return min(self.added) / min(self.plain) - 1


def added_cost(
    model: PaliGemma,
    *,
    rows: int,
    constraint: Constraint | None = None,
    observer: Observer | None = None,
    sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
    steps: int = 32,
    repeats: int = 9,
    clock: Callable[[], float] = time.perf_counter,
) -> AddedCost:
    """Times `steps` tokens of `rows` rows with and without, in turn, `repeats` times each.

    The prompt is short and without pictures: a decode step is as cheap as it gets, so that the
    share is rather stated too high. Nothing ends early. On a CPU that others use too,
    `clock=time.process_time` counts this process's work only.
    """
    size = model.config.img.image_size
    logits, filled = prefill(
        model,
        jnp.zeros((rows, 0, size, size, 3)),
        jnp.ones((rows, PROMPT), jnp.int32),
        jnp.zeros((rows, PROMPT), jnp.int32),
        jnp.ones((rows, PROMPT), bool),
        slots=PROMPT + steps,
    )

    def run(constraint: Constraint | None, observer: Observer | None) -> float:
        cache = jax.block_until_ready(jax.tree.map(jnp.copy, filled))  # decode takes it over
        before = clock()
        out = decode(
            model,
            cache,
            logits,
            jnp.ones((rows,), bool),
            jnp.arange(rows, dtype=jnp.uint32),
            jnp.asarray(steps, jnp.int32),
            sampler=sampler,
            capacity=steps,
            eos_id=NO_EOS,
            constraint=constraint,
            observer=observer,
        )
        jax.block_until_ready(out[:2])
        return (clock() - before) / steps

    for what in ((None, None), (constraint, observer)):
        run(*what)  # compiles
    times = [(run(None, None), run(constraint, observer)) for _ in range(repeats)]
    plain, added = zip(*times, strict=True)
    return AddedCost(plain, added)
