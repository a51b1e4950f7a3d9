"""The programs of generation: one prefill, and a decode loop that stays on the device.

`decode` runs the loop to its end in one program. `start_decoding` and `continue_decoding` run the
same steps some tokens at a time, for whoever must look at an answer while it is made; both ways
give the same tokens.

Letters: B batch, T prompt tokens, M new tokens at most, V vocabulary, K numbers observed a step.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from paligemma_jax.generation.constraint import Constraint
from paligemma_jax.generation.observer import Observer
from paligemma_jax.generation.sampling import Sampler, log_probability
from paligemma_jax.models.cache import KVCache
from paligemma_jax.models.jitted import Jitted
from paligemma_jax.models.paligemma import PaliGemma

_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What stays the same from token to token.

    Attributes:
      seeds: u32[B]; a row's draws depend on its own seed only.
      limit: i32[], tokens a row at most.
      sampler: how tokens are chosen.
      eos_id: the token that ends a row.
      constraint: which tokens may come next; None allows all.
      observer: what to note about each step; None notes nothing.
    """

    seeds: jax.Array
    limit: jax.Array
    sampler: Sampler = dataclasses.field(metadata=_STATIC)
    eos_id: int = dataclasses.field(metadata=_STATIC)
    constraint: Constraint | None = None
    observer: Observer | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeProgress:
    """What changes from token to token, besides the cache.

    Attributes:
      step: i32[], tokens written so far; the same for every row.
      token: i32[B], the last one; it is not in the cache yet.
      done: bool[B], the row has ended.
      tokens: i32[B, M], 0 after EOS and where nothing is written yet.
      logprobs: f32[B, M], log-probability (nats) of each under the untempered and unconstrained
        distribution; 0 where the token does not count.
      constraint_state: the constraint's.
      evidence: f32[B, M, K], what the observer noted.
    """

    step: jax.Array
    token: jax.Array
    done: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    constraint_state: Any = None
    evidence: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Decoding between two tokens: made by `start_decoding`, taken on by `continue_decoding`.

    The cache's memory is reused, so a state can be continued once. Its `progress` stays readable
    after that, also while the device already works on the next tokens.
    """

    plan: DecodePlan
    progress: DecodeProgress
    cache: KVCache

    @property
    def finished(self) -> bool:
        """Whether every row has ended or the limit is reached; waits for the device."""
        progress = self.progress
        return int(progress.step) >= int(self.plan.limit) or bool(np.all(progress.done))

    def end_rows(self, rows: Bool[np.ndarray, " B"]) -> "DecodeState":
        """Ends the rows where `rows` is True; they get no further token."""
        progress = self.progress
        done = progress.done | jnp.asarray(rows)
        return dataclasses.replace(self, progress=dataclasses.replace(progress, done=done))


@functools.partial(Jitted, static_argnames=("slots",))
def prefill(
    model: PaliGemma,
    images: Float[Array, "B N height width 3"],
    tokens: Int[Array, "B T"],
    mask_ar: Int[Array, "B T"],
    mask_input: Bool[Array, "B T"],
    slots: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Encodes the images, reads the prompts, and returns next-token logits and the filled cache."""
    return model.prefill(model.encode_images(images), tokens, mask_ar, mask_input, slots)


@functools.partial(
    Jitted, static_argnames=("sampler", "capacity", "eos_id"), donate_argnames=("cache",)
)
def decode(
    model: PaliGemma,
    cache: KVCache,
    logits: Float[Array, "B V"],
    row_mask: Bool[Array, " B"],
    seeds: UInt[Array, " B"],
    limit: Int[Array, ""],
    sampler: Sampler,
    capacity: int,
    eos_id: int,
    constraint: Constraint | None = None,
    observer: Observer | None = None,
) -> tuple[Int[Array, "B M"], Float[Array, "B M"], KVCache, Float[Array, "B M K"] | None]:
    """Generates until every row of `row_mask` has ended or `limit` tokens (at most `capacity`).

    Returns tokens (0 after EOS), the log-probability (nats) of each under the untempered and
    unconstrained distribution, and what `observer` noted (0 after EOS). A row's draws depend on its
    own seed only. The cache comes back so that its donated memory is reused in place. Without
    constraint and observer nothing of them is compiled.
    """
    plan = DecodePlan(seeds, limit, sampler, eos_id, constraint, observer)
    first = _first(plan, logits, row_mask, capacity)
    end, cache = _run(model, plan, first, cache, limit)
    return end.tokens, end.logprobs, cache, end.evidence


def start_decoding(
    plan: DecodePlan,
    cache: KVCache,
    logits: Float[Array, "B V"],
    row_mask: Bool[Array, " B"],
    capacity: int,
) -> DecodeState:
    """Chooses the first token of each row of `row_mask` from the logits that prefill gave.

    `capacity`, at least the plan's limit, is the room M for tokens; few different ones compile few
    programs. The cache must have been made with as much room. Nothing waits for the device.
    """
    return DecodeState(plan, _start(plan, logits, row_mask, capacity), cache)


def continue_decoding(model: PaliGemma, state: DecodeState, steps: int) -> DecodeState:
    """Up to `steps` tokens more a row: fewer if all rows end or the plan's limit is reached.

    One program whatever `steps` is. Nothing waits for the device: a state that is continued before
    the one before it is read keeps the device busy.
    """
    plan, progress = state.plan, state.progress
    progress, cache = _continue(model, plan, progress, state.cache, jnp.asarray(steps, jnp.int32))
    return DecodeState(plan, progress, cache)


@functools.partial(jax.jit, static_argnames=("capacity",))
def _start(
    plan: DecodePlan, logits: jax.Array, row_mask: jax.Array, capacity: int
) -> DecodeProgress:
    return _first(plan, logits, row_mask, capacity)


@functools.partial(Jitted, donate_argnames=("cache",))
def _continue(
    model: PaliGemma,
    plan: DecodePlan,
    progress: DecodeProgress,
    cache: KVCache,
    steps: jax.Array,
) -> tuple[DecodeProgress, KVCache]:
    until = jnp.minimum(progress.step + steps, plan.limit)
    return _run(model, plan, progress, cache, until)


def _run(
    model: PaliGemma,
    plan: DecodePlan,
    progress: DecodeProgress,
    cache: KVCache,
    until: jax.Array,
) -> tuple[DecodeProgress, KVCache]:
    """Steps until `until` tokens are written or every row has ended."""

    def unfinished(carried: tuple[DecodeProgress, KVCache]) -> jax.Array:
        progress, _ = carried
        return (progress.step < until) & ~jnp.all(progress.done)

    def step(carried: tuple[DecodeProgress, KVCache]) -> tuple[DecodeProgress, KVCache]:
        progress, cache = carried
        logits, cache = model.extend(progress.token, cache)
        return _write(plan, progress, logits), cache

    return jax.lax.while_loop(unfinished, step, (progress, cache))


def _first(
    plan: DecodePlan, logits: jax.Array, row_mask: jax.Array, capacity: int
) -> DecodeProgress:
    """Progress with one token a row."""
    batch = row_mask.shape[0]
    constraint, evidence = plan.constraint, None
    if plan.observer is not None:
        zero = jnp.zeros((batch,), jnp.int32)
        noted = jax.eval_shape(plan.observer.observe, logits, zero)
        evidence = jnp.zeros((batch, capacity, noted.shape[1]), jnp.float32)
    nothing = DecodeProgress(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros((batch,), jnp.int32),
        done=~row_mask,
        tokens=jnp.zeros((batch, capacity), jnp.int32),
        logprobs=jnp.zeros((batch, capacity), jnp.float32),
        constraint_state=None if constraint is None else constraint.start(batch, plan.limit),
        evidence=evidence,
    )
    return _write(plan, nothing, logits)


def _write(plan: DecodePlan, progress: DecodeProgress, logits: jax.Array) -> DecodeProgress:
    """Progress with one token more, chosen from `logits`."""
    step, done, constraint = progress.step, progress.done, plan.constraint
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(plan.seeds)
    state = progress.constraint_state
    token = plan.sampler(logits if constraint is None else constraint.allow(state, logits), keys)
    logp = log_probability(logits, token)
    token, logp = jnp.where(done, 0, token), jnp.where(done, 0.0, logp)
    return DecodeProgress(
        step=step + 1,
        token=token,
        done=done | (token == plan.eos_id),
        tokens=progress.tokens.at[:, step].set(token),
        logprobs=progress.logprobs.at[:, step].set(logp),
        constraint_state=None if constraint is None else constraint.advance(state, token),
        evidence=_note(plan, progress, logits, token),
    )


def _note(
    plan: DecodePlan, progress: DecodeProgress, logits: jax.Array, token: jax.Array
) -> jax.Array | None:
    if plan.observer is None or progress.evidence is None:
        return None
    seen = jnp.where(progress.done[:, None], 0.0, plan.observer.observe(logits, token))
    return progress.evidence.at[:, progress.step].set(seen)
