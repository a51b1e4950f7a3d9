"""Rotary embedding and grouped-query attention.

Letters: B batch, T query tokens, S key slots, N query heads, K key-value heads, G = N // K query
heads a key-value head, H head width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.models.masks import Layer, Mask

MASKED_LOGIT = -2.3819763e38  # most negative float32 that survives a cast to bfloat16
ROPE_MAX_WAVELENGTH = 10_000
SCORES = 64 << 20  # bytes of attention weights at a time: 224 and 448 pixels go at once
FEWEST_QUERIES = 64  # at a time, however much they take


def rotary_embedding(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"]
) -> Float[Array, "B T N H"]:
    """Rotates the first half of each head against the second (RoPE, arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    timescale = ROPE_MAX_WAVELENGTH ** (2 * jnp.arange(half, dtype=jnp.float32) / x.shape[-1])
    angle = positions[:, :, None, None].astype(jnp.float32) / timescale
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def soft_cap(logits: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """`cap * tanh(logits / cap)`; a cap of 0.0 leaves the logits alone."""
    return jnp.tanh(logits / cap) * cap if cap else logits


def attention_weights(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], mask: Bool[Array, "B T S"], cap: float
) -> Float[Array, "B N T S"]:
    """Softmax weights of each query over the keys: float32, sums to 1 over S, 0 where masked.

    Queries come scaled. A query that attends to nothing (padding) gets 1 / S everywhere.
    """
    batch, length, heads, _ = q.shape
    return _weights(_grouped(q, k.shape[1]), k, mask, cap).reshape(batch, heads, length, -1)


def grouped_query_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    cap: float,
) -> Float[Array, "B T N H"]:
    """Softmax attention, N // K query heads a key head; queries come scaled, softmax is float32."""
    batch, length, heads, width = q.shape
    weights = _weights(_grouped(q, k.shape[1]), k, mask, cap).astype(v.dtype)
    out = jnp.einsum("BKRS,BKSH->BKRH", weights, v, preferred_element_type=jnp.float32)
    out = out.astype(q.dtype).reshape(batch, heads, length, width)
    return out.swapaxes(1, 2)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    layer: Layer,
    cap: float,
) -> Float[Array, "B T N H"]:
    """`grouped_query_attention` as `mask` has it for this layer.

    Long sequences go through in blocks of queries, so that neither weights nor mask of all T x S
    pairs are ever held; the numbers are the same.
    """

    def of_rows(q: jax.Array, start: jax.Array) -> jax.Array:
        allowed = mask.rows(start, q.shape[1]).visible(layer)
        return grouped_query_attention(q, k, v, allowed, cap)

    return in_query_blocks(of_rows, q, k.shape[2])


def in_query_blocks(
    attend: Callable[[jax.Array, jax.Array], jax.Array],
    q: Float[Array, "B T N H"],
    keys: int,
) -> Float[Array, "B T N H"]:
    """`attend(q, 0)`, or of some queries at a time with the first one's place, if they are many.

    A block is as large as its float32 weights over `keys` keys stay within SCORES bytes.
    """
    batch, length, heads, _ = q.shape
    size = SCORES // (4 * batch * heads * keys)
    if length <= max(size, FEWEST_QUERIES):
        return attend(q, jnp.zeros((), jnp.int32))
    size = max(1 << size.bit_length() - 1 if size else 0, FEWEST_QUERIES)
    blocks, last = -(-length // size), length - size  # the last one overlaps the one before it

    @jax.checkpoint  # a gradient computes the weights of a block again instead of keeping all
    def block(number: jax.Array) -> jax.Array:
        start = jnp.minimum(number * size, last)
        return attend(jax.lax.dynamic_slice_in_dim(q, start, size, axis=1), start)

    out = jnp.moveaxis(jax.lax.map(block, jnp.arange(blocks)), 0, 1)
    whole = out[:, :-1].reshape(batch, -1, *q.shape[2:])
    rest = length - whole.shape[1]
    return jnp.concatenate([whole, out[:, -1, size - rest :]], axis=1)


def _grouped(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K GT H"]:
    """Queries of one key head side by side: one matmul for each key head, not for each query's."""
    batch, length, heads, width = q.shape
    return q.swapaxes(1, 2).reshape(batch, kv_heads, heads // kv_heads * length, width)


def _weights(
    q: Float[Array, "B K GT H"], k: Float[Array, "B K S H"], mask: Bool[Array, "B T S"], cap: float
) -> Float[Array, "B K GT S"]:
    batch, kv_heads, rows, _ = q.shape
    _, length, slots = mask.shape
    logits = jnp.einsum("BKRH,BKSH->BKRS", q, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, kv_heads, rows // length, length, slots)
    logits = jnp.where(mask[:, None, None], soft_cap(logits, cap), MASKED_LOGIT)
    return jax.nn.softmax(logits, axis=-1).reshape(batch, kv_heads, rows, slots)
