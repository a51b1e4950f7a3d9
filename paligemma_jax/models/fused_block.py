"""One decoder layer with weights stored for decoding: fused, contracted axes last.

Queries, keys and values come from one product, both gates of the MLP from another. The numbers are
those of `Attention` and `FeedForward`, in another order; `unroll` moves them.

Letters: B batch, T tokens, W width, F MLP width, N query heads, K key-value heads, H head width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from paligemma_jax.config import GemmaConfig
from paligemma_jax.models.attention import rotary_embedding
from paligemma_jax.models.backend import on_cpu
from paligemma_jax.models.contraction import contract
from paligemma_jax.models.gemma_block import Block
from paligemma_jax.models.layers import DType


class Projection(nnx.Module):
    """One weight [*out, *in], contracted over its last axes; what quantisation replaces."""

    def __init__(
        self, out_shape: tuple[int, ...], in_shape: tuple[int, ...], *, dtype: DType, w: DType
    ):
        self.axes = len(in_shape)
        self.dtype = dtype
        self.w = nnx.Param(jnp.zeros(out_shape + in_shape, w))

    def __call__(self, x: Float[Array, "B T *of_in"]) -> Float[Array, "B T *of_out"]:
        """Multiplied in the activation dtype, added up and given back in float32."""
        return contract(self.w[...], x.astype(self.dtype), self.axes)


class FusedAttention(nnx.Module):
    """Queries, then keys, then values from one weight; see `Projections`."""

    def __init__(self, config: GemmaConfig, *, dtype: DType, param_dtype: DType):
        c = config
        kw = dict(dtype=dtype, w=param_dtype)
        self.config = c
        self.qkv = Projection((c.num_heads + 2 * c.num_kv_heads, c.head_dim), (c.width,), **kw)
        self.out = Projection((c.width,), (c.num_heads, c.head_dim), **kw)

    def project(
        self, x: Float[Array, "B T W"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """See `Projections`."""
        c = self.config
        heads = self.qkv(x).astype(x.dtype)
        rotated = rotary_embedding(heads[:, :, : c.num_heads + c.num_kv_heads], positions)
        q, k = jnp.split(rotated, [c.num_heads], axis=2)
        v = heads[:, :, c.num_heads + c.num_kv_heads :]
        return q * c.query_scale, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def output(self, mixed: Float[Array, "B T N H"]) -> Float[Array, "B T W"]:
        """See `Projections`."""
        return self.out(mixed).astype(mixed.dtype)


class FusedFeedForward(nnx.Module):
    """Gated GELU with both gates from one product; see `FeedForward`."""

    def __init__(self, config: GemmaConfig, *, dtype: DType, param_dtype: DType):
        kw = dict(dtype=dtype, w=param_dtype)
        self.gate_up = Projection((2, config.mlp_dim), (config.width,), **kw)
        self.down = Projection((config.width,), (config.mlp_dim,), **kw)

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        both = self.gate_up(x)
        if not on_cpu():  # where reading and writing them costs more than rounding
            both = both.astype(x.dtype)
        hidden = jax.nn.gelu(both[:, :, 0], approximate=True) * both[:, :, 1]
        return self.down(hidden.astype(x.dtype)).astype(x.dtype)


def make_fused_block(config: GemmaConfig, *, dtype: DType, param_dtype: DType) -> Block:
    """A layer of zeros, to be filled."""
    kw = dict(dtype=dtype, param_dtype=param_dtype)
    return Block(config, FusedAttention(config, **kw), FusedFeedForward(config, **kw), **kw)
