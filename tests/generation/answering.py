"""One way to run the two programs of generation in these tests."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from paligemma_jax.generation.constraints import Constraint
from paligemma_jax.generation.decode import decode, prefill
from paligemma_jax.generation.sampling import Greedy, Sampler
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch

CAPACITY = 8
NO_EOS = -1


def answer(
    model: PaliGemma,
    batch: Batch,
    *,
    sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
    seeds: Sequence[int] | None = None,
    row_mask: Sequence[bool] | None = None,
    limit: int = CAPACITY,
    eos_id: int = NO_EOS,
    constraint: Constraint | None = None,
) -> tuple[np.ndarray, np.ndarray, KVCache]:
    """Tokens i32[B, 8], their log-probabilities f32[B, 8], and the cache at the end."""
    rows = batch.tokens.shape[0]
    inputs = [jnp.asarray(x) for x in (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)]
    patches = inputs[0].shape[1] * model.config.img.num_patches
    logits, cache = prefill(model, *inputs, slots=patches + batch.tokens.shape[1] + CAPACITY)
    tokens, logprobs, cache, _ = decode(
        model,
        cache,
        logits,
        jnp.ones(rows, bool) if row_mask is None else jnp.asarray(row_mask),
        jnp.arange(rows, dtype=jnp.uint32) if seeds is None else jnp.asarray(seeds, jnp.uint32),
        jnp.asarray(limit, jnp.int32),
        sampler=sampler,
        capacity=CAPACITY,
        eos_id=eos_id,
        constraint=constraint,
    )
    return np.asarray(tokens), np.asarray(logprobs), cache


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, in the order given."""
    take = list(rows)
    return Batch(
        images=np.asarray(batch.images)[take],
        tokens=np.asarray(batch.tokens)[take],
        mask_ar=np.asarray(batch.mask_ar)[take],
        mask_input=np.asarray(batch.mask_input)[take],
    )
