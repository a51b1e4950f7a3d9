"""Batch in, tokens out: what both the pipeline and a script with its own model call."""

from collections.abc import Sequence

import jax
import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.answers import MIN_CAPACITY as MIN_CAPACITY
from paligemma_jax.generation.answers import AnswerSettings, answer_rows
from paligemma_jax.generation.answers import GeneratedTokens as GeneratedTokens
from paligemma_jax.generation.constraint import Constraint
from paligemma_jax.generation.observer import Observer
from paligemma_jax.generation.prefix import read_prefix
from paligemma_jax.generation.sampling import Greedy, Sampler
from paligemma_jax.generation.stopping import StopStrings
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.batch import Batch


def generate(
    model: PaliGemma,
    batch: Batch,
    *,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
    seed: int | Sequence[int] = 0,
    eos_id: int = 1,
    constraint: Constraint | Sequence[Constraint] | None = None,
    observer: Observer | None = None,
    stop: StopStrings | None = None,
    image_tokens: jax.Array | None = None,
) -> list[GeneratedTokens]:
    """Answers the real rows of `batch`, each until EOS, a stop string or `max_new_tokens`.

    Shapes are rounded up (rows, text and room for the answer to powers of two), so that a stream
    of different requests compiles few programs. Where the batch holds beginnings of answers (see
    `Processor`), answers are what comes after them; all limits count from there.

    Args:
      model: the model.
      batch: the prompts.
      max_new_tokens: where an answer without end is cut.
      min_new_tokens: EOS is not allowed before so many other tokens, unless `constraint` allows
        nothing else; a stop string still ends an answer.
      sampler: how tokens are chosen.
      seed: one number for the batch (row i then draws from seed + i) or one a row; a row's draws
        depend on its own seed alone.
      eos_id: the token that ends an answer.
      constraint: what may be answered; one for the batch, or one a row, all of one class.
      observer: reads numbers off every step.
      stop: texts that end an answer, which are looked for every 8 tokens.
      image_tokens: the pictures of a batch without any, encoded before (see `prepare`).

    Raises:
      ConfigError: for numbers of tokens that no answer can have, seeds or constraints that do not
        match the rows, and constraints that no answer of `max_new_tokens` could keep.
    """
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
    seeds = row_seeds(seed, row_mask)
    logits, cache = read_prefix(model, batch, image_tokens, room=settings.capacity)
    return answer_rows(model, settings, together, logits, cache, row_mask, seeds)


def real_rows(batch: Batch) -> np.ndarray:
    """bool[B], False on rows that only fill the batch."""
    rows = batch.tokens.shape[0]
    return np.ones(rows, bool) if batch.row_mask is None else np.asarray(batch.row_mask)


def row_seeds(seed: int | Sequence[int], row_mask: np.ndarray) -> np.ndarray:
    """u32[B]: seed + i for row i, or the given ones for the real rows in their order."""
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
