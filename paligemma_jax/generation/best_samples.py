"""Several drawn answers to each prompt, the likeliest first; the prompt is read once."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.answers import AnswerSettings, GeneratedTokens, answer_rows
from paligemma_jax.generation.constraint import Constraint, PerRow
from paligemma_jax.generation.generate import real_rows, row_seeds
from paligemma_jax.generation.observer import Observer
from paligemma_jax.generation.prefix import read_prefix
from paligemma_jax.generation.ranking import answer_score
from paligemma_jax.generation.sampling import Greedy, Sampler, Temperature
from paligemma_jax.generation.stopping import StopStrings
from paligemma_jax.models.cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.batch import Batch


def best_of(
    model: PaliGemma,
    batch: Batch,
    *,
    samples: int,
    alpha: float = 0.0,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    sampler: Sampler = Temperature(),  # noqa: B008 (frozen)
    seed: int | Sequence[int] = 0,
    eos_id: int = 1,
    constraint: Constraint | Sequence[Constraint] | None = None,
    observer: Observer | None = None,
    stop: StopStrings | None = None,
    image_tokens: jax.Array | None = None,
) -> list[list[GeneratedTokens]]:
    """`samples` answers to each real row of `batch`, drawn on their own, best first.

    The first sample of a row is what `generate` draws with the row's seed; the others depend on
    that seed and their number alone. Pictures and prompt are read once, then their keys and values
    are copied for every sample: the cache takes `samples` times the memory it takes in `generate`
    (once more while it is copied), for PaliGemma 2 3B in bfloat16 `samples` times 104 KiB a token.

    Args:
      samples: answers a prompt; equal ones are not removed.
      alpha: answers are ranked by logprob / len(tokens) ** alpha, as in `beam_search`: 0 ranks by
        probability, as big_vision, 1 by the mean log-probability of a token. Log-probabilities are
        the model's, whatever sampler and constraint did, and count what ended the answer.
      model, batch, max_new_tokens, min_new_tokens, sampler, seed, eos_id, constraint, observer,
        stop, image_tokens: as for `generate`.

    Raises:
      ConfigError: for less than one sample, several without a sampler that draws, and as
        `generate` does.
    """
    if samples < 1 or (samples > 1 and isinstance(sampler, Greedy)):
        raise ConfigError(
            f"{samples} samples by {type(sampler).__name__} leave no choice. At least one, and a "
            "sampler that draws, fit. Call best_of(model, batch, samples=4)"
        )
    settings = AnswerSettings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampler=sampler,
        eos_id=eos_id,
        constraint=constraint,
        observer=observer,
        stop=stop,
    )
    row_mask = real_rows(batch)
    together = settings.constraint_of(row_mask, model.config.llm.vocab_size)
    if isinstance(together, PerRow):
        together = PerRow(jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), together.rows))
    seeds = sample_seeds(row_seeds(seed, row_mask), samples)
    logits, cache = read_prefix(model, batch, image_tokens, room=settings.capacity)
    logits, cache = _repeat(logits, cache, samples)
    answers = answer_rows(
        model, settings, together, logits, cache, np.repeat(row_mask, samples), seeds
    )
    rows = [answers[i : i + samples] for i in range(0, len(answers), samples)]

    def worst_last(answer: GeneratedTokens) -> float:
        return -answer_score(answer.logprob, len(answer.tokens), alpha)

    return [sorted(row, key=worst_last) for row in rows]


def sample_seeds(seeds: np.ndarray, samples: int) -> np.ndarray:
    """u32[B * samples], from u32[B]: each row's own seed, then others made of it and a number.

    Not seed + 1, seed + 2, ...: these are the seeds of the rows that follow.
    """
    made = [
        [int(seed)]
        + [
            int(np.random.SeedSequence([int(seed), n]).generate_state(1)[0])
            for n in range(1, samples)
        ]
        for seed in seeds
    ]
    return np.array(made, np.uint32).reshape(-1)


@functools.partial(jax.jit, static_argnames=("times",))
def _repeat(logits: jax.Array, cache: KVCache, times: int) -> tuple[jax.Array, KVCache]:
    """Each row `times` times, side by side."""
    return jnp.repeat(logits, times, axis=0), cache.repeat_rows(times)
