"""Batch in, tokens out: what both the pipeline and a script with its own model call."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.constraint import Constraint, for_batch
from paligemma_jax.generation.loop import decode
from paligemma_jax.generation.observer import Observer
from paligemma_jax.generation.prefix import read_prefix
from paligemma_jax.generation.sampling import Greedy, Sampler
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.batch import Batch
from paligemma_jax.processing.buckets import bucket

MIN_CAPACITY = 16  # new tokens; room is made for a power of two of at least so many


@dataclasses.dataclass(frozen=True)
class GeneratedTokens:
    """One row's answer: `tokens` up to and including EOS, and the log-probability (nats) of each.

    Log-probabilities are those of the model, whatever sampler and constraint did to the
    distribution. `evidence` holds an observer's numbers for each token.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    evidence: tuple[tuple[float, ...], ...] = ()


def generate(
    model: PaliGemma,
    batch: Batch,
    *,
    max_new_tokens: int = 128,
    sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
    seed: int | Sequence[int] = 0,
    eos_id: int = 1,
    constraint: Constraint | Sequence[Constraint] | None = None,
    observer: Observer | None = None,
    image_tokens: jax.Array | None = None,
) -> list[GeneratedTokens]:
    """Answers the real rows of `batch`, each until EOS or `max_new_tokens`.

    Shapes are rounded up (rows, text and room for the answer to powers of two), so that a stream
    of different requests compiles few programs. `seed` is one number for the batch (row i then
    draws from seed + i) or one a row; a row's draws depend on its own seed alone. `constraint` is
    one for the batch or one a row, all of one class; `observer` reads numbers off every step;
    `image_tokens` are the pictures of a batch without any, encoded before (see `prepare`).

    Raises:
      ConfigError: for fewer than one new token, seeds or constraints that do not match the rows,
        and constraints that no answer of `max_new_tokens` could keep.
    """
    if max_new_tokens < 1:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}; nothing can be generated. It must be at least 1."
        )
    rows = batch.tokens.shape[0]
    row_mask = np.ones(rows, bool) if batch.row_mask is None else np.asarray(batch.row_mask)
    if constraint is not None:
        vocab_size = model.config.llm.vocab_size
        constraint = for_batch(constraint, row_mask, vocab_size, max_new_tokens)
    capacity = bucket(max_new_tokens, MIN_CAPACITY)
    logits, cache = read_prefix(model, batch, image_tokens, room=capacity)
    tokens, logprobs, _, evidence = decode(
        model,
        cache,
        logits,
        jnp.asarray(row_mask),
        jnp.asarray(_row_seeds(seed, row_mask)),
        jnp.asarray(max_new_tokens, jnp.int32),
        sampler=sampler,
        capacity=capacity,
        eos_id=eos_id,
        constraint=constraint,
        observer=observer,
    )
    tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
    seen = None if evidence is None else np.asarray(evidence)
    return [
        _cut(
            tokens[row, :max_new_tokens], logprobs[row], None if seen is None else seen[row], eos_id
        )
        for row in np.flatnonzero(row_mask)
    ]


def _row_seeds(seed: int | Sequence[int], row_mask: np.ndarray) -> np.ndarray:
    if isinstance(seed, int | np.integer):
        return (int(seed) + np.arange(row_mask.size)).astype(np.uint32)
    real = np.flatnonzero(row_mask)
    if len(seed) != real.size:
        raise ConfigError(
            f"{len(seed)} seeds do not match {real.size} prompts. One seed a prompt, or one number "
            "for all, fits."
        )
    seeds = np.zeros(row_mask.size, np.uint32)
    seeds[real] = np.asarray(seed).astype(np.uint32)
    return seeds


def _cut(
    tokens: np.ndarray, logprobs: np.ndarray, evidence: np.ndarray | None, eos_id: int
) -> GeneratedTokens:
    ends = np.flatnonzero(tokens == eos_id)
    length = int(ends[0]) + 1 if ends.size else tokens.size
    seen = () if evidence is None else evidence[:length].tolist()
    return GeneratedTokens(
        tuple(int(t) for t in tokens[:length]),
        tuple(float(p) for p in logprobs[:length]),
        tuple(map(tuple, seen)),
    )
