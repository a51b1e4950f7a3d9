"""Prefix-LM masks, rotary embedding, grouped-query attention and the key-value cache.

Letters: B batch, T query tokens, S key slots, N query heads, K key-value heads, G = N // K query
heads a key-value head, H head width, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.models.layers import DType

MASKED_LOGIT = -2.3819763e38  # most negative float32 that survives a cast to bfloat16
ROPE_MAX_WAVELENGTH = 10_000


def prefix_lm_mask(
    mask_ar: Int[Array, "B T"], input_mask: Bool[Array, "B T"]
) -> Bool[Array, "B T T"]:
    """Which token (row) may look at which (column): big_vision's `mask_ar` rule.

    `mask_ar[i] == 1` says that tokens before i must not see i; runs of 0 form one block that sees
    itself fully. With three prefix tokens and two of an answer, mask_ar = 0 0 0 1 1:

        # # # . .
        # # # . .
        # # # . .
        # # # # .
        # # # # #
    """
    block = jnp.cumsum(mask_ar, axis=1)
    visible = block[:, None, :] <= block[:, :, None]
    return visible & input_mask[:, None, :] & input_mask[:, :, None]


def sliding_window_mask(
    mask: Bool[Array, "B T S"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    same_block: Bool[Array, "B T S"],
    window: int,
) -> Bool[Array, "B T S"]:
    """Narrows `mask` to the last `window` positions, except inside one bidirectional block.

    Hugging Face's rule for the even layers of Gemma 2: image and prompt see each other whole,
    answer tokens look back `window` positions, themselves included.
    """
    near = query_positions[:, :, None] - key_positions[:, None, :] < window
    return mask & (near | same_block)


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
) -> Float[Array, "B K G T S"]:
    """How much each query looks at each key: float32, sums to 1 over S, 0 where masked.

    Queries come scaled. A query that may see nothing (padding) gets 1 / S everywhere.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], soft_cap(logits, cap), MASKED_LOGIT)
    return jax.nn.softmax(logits, axis=-1)


def grouped_query_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    cap: float,
) -> Float[Array, "B T N H"]:
    """Softmax attention, N // K query heads a key head; queries come scaled, softmax is float32."""
    weights = attention_weights(q, k, mask, cap).astype(v.dtype)
    out = jnp.einsum("BKGTS,BKSH->BTKGH", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of every layer, slot by slot.

    A prompt fills slots 0..T-1 (a shorter row leaves its padding slots unused), each generated
    token the next slot, the same one for every row; `valid` and `positions` say what a slot holds.
    Rows that go on at different paces have a `length` each.
    """

    k: jax.Array  # [L, B, K, S, H]
    v: jax.Array  # [L, B, K, S, H]
    valid: jax.Array  # bool[B, S]
    positions: jax.Array  # i32[B, S], place in the row's own sequence
    length: jax.Array  # i32[], slots in use; or i32[B], of each row

    def write(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> "KVCache":
        """Stores k, v [B, K, T, H] of one layer at slots length..length+T-1."""
        if self.length.ndim:
            rows, slots = self._own_slots(k.shape[2])
            k, v = (x.swapaxes(1, 2).astype(self.k.dtype) for x in (k, v))
            return dataclasses.replace(
                self,
                k=self.k.at[layer, rows, :, slots].set(k),
                v=self.v.at[layer, rows, :, slots].set(v),
            )
        start = (layer, 0, 0, self.length, 0)
        return dataclasses.replace(
            self,
            k=jax.lax.dynamic_update_slice(self.k, k[None].astype(self.k.dtype), start),
            v=jax.lax.dynamic_update_slice(self.v, v[None].astype(self.v.dtype), start),
        )

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, S, H] of one layer."""
        return (
            jax.lax.dynamic_index_in_dim(self.k, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.v, layer, keepdims=False),
        )

    def claim(self, valid: jax.Array, positions: jax.Array) -> "KVCache":
        """Marks the next T slots with valid bool[B, T], positions i32[B, T]; length unchanged."""
        if self.length.ndim:
            rows, slots = self._own_slots(valid.shape[1])
            return dataclasses.replace(
                self,
                valid=self.valid.at[rows, slots].set(valid),
                positions=self.positions.at[rows, slots].set(positions),
            )
        start = (0, self.length)
        return dataclasses.replace(
            self,
            valid=jax.lax.dynamic_update_slice(self.valid, valid, start),
            positions=jax.lax.dynamic_update_slice(self.positions, positions, start),
        )

    def advance(self, tokens: int) -> "KVCache":
        """Counts `tokens` more slots as used."""
        return dataclasses.replace(self, length=self.length + tokens)

    def _own_slots(self, tokens: int) -> tuple[jax.Array, jax.Array]:
        """Rows [B, 1] and their next slots [B, T], where every row has its own length."""
        slots = self.length[:, None] + jnp.arange(tokens)
        return jnp.arange(slots.shape[0])[:, None], slots


def empty_cache(
    depth: int, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: DType
) -> KVCache:
    """A cache with nothing in it."""
    shape = (depth, batch, kv_heads, slots, head_dim)
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        valid=jnp.zeros((batch, slots), bool),
        positions=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )
