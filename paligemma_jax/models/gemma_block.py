"""One decoder layer of Gemma or Gemma 2, with weights as they are trained.

Letters: B batch, T tokens, S cache slots, W width, F MLP width, N query heads, K key-value heads,
H head width.
"""

from typing import Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from paligemma_jax.config import GemmaConfig
from paligemma_jax.models.attention import attention, attention_weights, rotary_embedding
from paligemma_jax.models.dropout import Dropout
from paligemma_jax.models.layers import DType, Einsum, RMSNorm
from paligemma_jax.models.masks import Layer, Mask


@runtime_checkable
class Projections(Protocol):
    """What stands around attention, however its weights are stored."""

    def project(
        self, x: Float[Array, "B T W"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Rotated and scaled queries, rotated keys, values."""
        ...

    def output(self, mixed: Float[Array, "B T N H"]) -> Float[Array, "B T W"]:
        """What attention found, in the model's width."""
        ...


@runtime_checkable
class MLP(Protocol):
    """The gated network of a layer, however its weights are stored."""

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]: ...


class Attention(nnx.Module):
    """Projections around grouped-query attention, one weight each as in big_vision."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        c = config
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.query_scale = c.query_scale
        self.q_einsum = Einsum((c.num_heads, c.width, c.head_dim), fan_in=c.width, **kw)
        self.kv_einsum = Einsum((2, c.num_kv_heads, c.width, c.head_dim), fan_in=c.width, **kw)
        self.attn_vec_einsum = Einsum(
            (c.num_heads, c.head_dim, c.width), fan_in=c.num_heads * c.head_dim, **kw
        )

    def project(
        self, x: Float[Array, "B T W"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """See `Projections`."""
        q = rotary_embedding(self.q_einsum("BTW,NWH->BTNH", x), positions)
        k, v = self.kv_einsum("BTW,CKWH->CBTKH", x)
        k = rotary_embedding(k, positions)
        return q * self.query_scale, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def output(self, mixed: Float[Array, "B T N H"]) -> Float[Array, "B T W"]:
        """See `Projections`."""
        return self.attn_vec_einsum("BTNH,NHW->BTW", mixed)


class FeedForward(nnx.Module):
    """Gated GELU (arXiv 2002.05202): gate 0 is activated, gate 1 is linear."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.gating_einsum = Einsum((2, config.width, config.mlp_dim), fan_in=config.width, **kw)
        self.linear = Einsum((config.mlp_dim, config.width), fan_in=config.mlp_dim, **kw)

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        gate, up = self.gating_einsum("BTW,CWF->CBTF", x)
        return self.linear("BTF,FW->BTW", jax.nn.gelu(gate, approximate=True) * up)


class Block(nnx.Module):
    """One decoder layer; Gemma 2 normalises again after attention and after the MLP."""

    def __init__(
        self,
        config: GemmaConfig,
        attn: Projections,
        mlp: MLP,
        *,
        dtype: DType,
        param_dtype: DType,
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.post_norms = config.post_norms
        self.softcap = config.attn_logit_softcap
        self.pre_attention_norm = RMSNorm(config.width, **kw)
        self.attn = attn
        self.pre_ffw_norm = RMSNorm(config.width, **kw)
        self.mlp = mlp
        if config.post_norms:
            self.post_attention_norm = RMSNorm(config.width, **kw)
            self.post_ffw_norm = RMSNorm(config.width, **kw)

    def project(
        self, x: Float[Array, "B T W"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Queries, keys and values of this layer's tokens."""
        return self.attn.project(self.pre_attention_norm(x), positions)

    def weights(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], mask: Mask, layer: Layer
    ) -> Float[Array, "B N T S"]:
        """What attention weighs the values with, head by head, before any rounding."""
        return attention_weights(q, k.astype(q.dtype), mask.visible(layer), self.softcap)

    def finish(
        self,
        x: Float[Array, "B T W"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K S H"],
        v: Float[Array, "B K S H"],
        mask: Mask,
        layer: Layer,
        dropout: Dropout | None = None,
    ) -> Float[Array, "B T W"]:
        """The rest of the layer, once it is known which keys and values to look at.

        Dropout is big_vision's: after the second norm of attention, before that of the MLP.
        """
        mixed = attention(q, k.astype(q.dtype), v.astype(q.dtype), mask, layer, self.softcap)
        h = self.attn.output(mixed)
        h = self.post_attention_norm(h) if self.post_norms else h
        x = x + (dropout.at(0)(h) if dropout else h)
        h = self.mlp(self.pre_ffw_norm(x))
        h = dropout.at(1)(h) if dropout else h
        return x + (self.post_ffw_norm(h) if self.post_norms else h)


def make_block(config: GemmaConfig, rngs: nnx.Rngs, *, dtype: DType, param_dtype: DType) -> Block:
    """A layer with new random weights."""
    kw = dict(dtype=dtype, param_dtype=param_dtype)
    attn = Attention(config, rngs=rngs, **kw)
    return Block(config, attn, FeedForward(config, rngs=rngs, **kw), **kw)
