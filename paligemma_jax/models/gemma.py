"""Gemma and Gemma 2 decoders (arXiv 2403.08295, 2408.00118), run over embeddings.

Letters: B batch, T tokens, S cache slots, W width, F MLP width, N query heads, K key-value heads,
H head width, V vocabulary, L layers, M attention masks that layers take in turn.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.config import GemmaConfig
from paligemma_jax.models.attention import (
    KVCache,
    attention_weights,
    grouped_query_attention,
    rotary_embedding,
    soft_cap,
)
from paligemma_jax.models.layers import DType, Einsum, RMSNorm
from paligemma_jax.models.stacked import fold_layers, scan_layers, stack_layers

Seen = TypeVar("Seen")


class Embedder(nnx.Module):
    """The token table: looked up and scaled by sqrt(W) going in, tied output head going out."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        self.dtype = dtype
        shape = (config.vocab_size, config.width)
        init = jax.random.normal(rngs.params(), shape) * config.width**-0.5
        self.input_embedding = nnx.Param(init.astype(param_dtype))

    def encode(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """Scaled embeddings; the scale is rounded to the table's dtype, as in big_vision."""
        x = self.input_embedding[...][tokens]
        return (x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)).astype(self.dtype)

    def decode(self, x: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """Logits in float32."""
        return _logits(x, self.input_embedding[...])


class Head(nnx.Module):
    """An output head of its own, for checkpoints that were fine-tuned with one."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        shape = (config.vocab_size, config.width)
        init = jax.random.normal(rngs.params(), shape) * config.width**-0.5
        self.w = nnx.Param(init.astype(param_dtype))

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        return _logits(x, self.w[...])


def _logits(x: Float[Array, "B T W"], table: Float[Array, "V W"]) -> Float[Array, "B T V"]:
    table = table.astype(x.dtype)
    return jnp.einsum("BTW,VW->BTV", x, table, preferred_element_type=jnp.float32)


class Attention(nnx.Module):
    """Projections around grouped-query attention."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        c = config
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = c
        self.q_einsum = Einsum((c.num_heads, c.width, c.head_dim), fan_in=c.width, **kw)
        self.kv_einsum = Einsum((2, c.num_kv_heads, c.width, c.head_dim), fan_in=c.width, **kw)
        self.attn_vec_einsum = Einsum(
            (c.num_heads, c.head_dim, c.width), fan_in=c.num_heads * c.head_dim, **kw
        )

    def project(
        self, x: Float[Array, "B T W"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Rotated and scaled queries, rotated keys, values."""
        q = rotary_embedding(self.q_einsum("BTW,NWH->BTNH", x), positions)
        k, v = self.kv_einsum("BTW,CKWH->CBTKH", x)
        k = rotary_embedding(k, positions)
        return q * self.config.query_scale, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K S H"],
        v: Float[Array, "B K S H"],
        mask: Bool[Array, "B T S"],
    ) -> Float[Array, "B T W"]:
        mixed = grouped_query_attention(
            q, k.astype(q.dtype), v.astype(q.dtype), mask, self.config.attn_logit_softcap
        )
        return self.attn_vec_einsum("BTNH,NHW->BTW", mixed)

    def weights(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K S H"],
        mask: Bool[Array, "B T S"],
    ) -> Float[Array, "B N T S"]:
        """What `attend` weighs the values with, head by head, before any rounding."""
        weights = attention_weights(q, k.astype(q.dtype), mask, self.config.attn_logit_softcap)
        return weights.reshape(q.shape[0], self.config.num_heads, *mask.shape[1:])


class FeedForward(nnx.Module):
    """Gated GELU (arXiv 2002.05202): gate 0 is activated, gate 1 is linear."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.gating_einsum = Einsum((2, config.width, config.mlp_dim), fan_in=config.width, **kw)
        self.linear = Einsum((config.mlp_dim, config.width), fan_in=config.mlp_dim, **kw)

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        both = self.gating_einsum("BTW,CWF->BTCF", x)
        gate, up = both[:, :, 0], both[:, :, 1]
        return self.linear("BTF,FW->BTW", jax.nn.gelu(gate, approximate=True) * up)


class Block(nnx.Module):
    """One decoder layer; Gemma 2 normalises again after attention and after the MLP."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.post_norms = config.post_norms
        self.pre_attention_norm = RMSNorm(config.width, **kw)
        self.attn = Attention(config, rngs=rngs, **kw)
        self.pre_ffw_norm = RMSNorm(config.width, **kw)
        self.mlp = FeedForward(config, rngs=rngs, **kw)
        if config.post_norms:
            self.post_attention_norm = RMSNorm(config.width, **kw)
            self.post_ffw_norm = RMSNorm(config.width, **kw)

    def project(
        self, x: Float[Array, "B T W"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Queries, keys and values of this layer's tokens."""
        return self.attn.project(self.pre_attention_norm(x), positions)

    def finish(
        self,
        x: Float[Array, "B T W"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K S H"],
        v: Float[Array, "B K S H"],
        mask: Bool[Array, "B T S"],
    ) -> Float[Array, "B T W"]:
        """The rest of the layer, once it is known which keys and values to look at."""
        h = self.attn.attend(q, k, v, mask)
        x = x + (self.post_attention_norm(h) if self.post_norms else h)
        h = self.mlp(self.pre_ffw_norm(x))
        return x + (self.post_ffw_norm(h) if self.post_norms else h)


class Gemma(nnx.Module):
    """Decoder over embeddings; three ways through: forward, prefill (fills a cache), extend.

    `watch` is forward with a view of its attention.
    """

    def __init__(
        self,
        config: GemmaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.config = config
        self.embedder = Embedder(config, rngs=rngs, **kw)
        self.layers = stack_layers(
            lambda layer_rngs: Block(config, rngs=layer_rngs, **kw), config.depth, rngs
        )
        self.final_norm = RMSNorm(config.width, **kw)
        if not config.tie_embeddings:
            self.lm_head = Head(config, rngs=rngs, **kw)

    def __call__(
        self,
        x: Float[Array, "B T W"],
        positions: Int[Array, "B T"],
        masks: Bool[Array, "M B T T"],
    ) -> Float[Array, "B T W"]:
        """Normalised hidden states of a whole sequence; layer i uses mask i modulo M."""

        def apply(block: Block, x: jax.Array, index: jax.Array) -> jax.Array:
            q, k, v = block.project(x, positions)
            return block.finish(x, q, k, v, masks[index % masks.shape[0]])

        return self.final_norm(scan_layers(self.layers, apply, x))

    def watch(
        self,
        x: Float[Array, "B T W"],
        positions: Int[Array, "B T"],
        masks: Bool[Array, "M B T T"],
        see: Callable[[Seen, jax.Array, jax.Array], Seen],
        seen: Seen,
    ) -> tuple[Float[Array, "B T W"], Seen]:
        """As `__call__`, folding `seen = see(seen, weights f32[B, N, T, T], layer)` over layers."""

        def apply(
            block: Block, carry: tuple[jax.Array, Seen], index: jax.Array
        ) -> tuple[jax.Array, Seen]:
            x, seen = carry
            q, k, v = block.project(x, positions)
            mask = masks[index % masks.shape[0]]
            seen = see(seen, block.attn.weights(q, k, mask), index)
            return block.finish(x, q, k, v, mask), seen

        x, seen = scan_layers(self.layers, apply, (x, seen))
        return self.final_norm(x), seen

    def prefill(
        self,
        x: Float[Array, "B T W"],
        positions: Int[Array, "B T"],
        masks: Bool[Array, "M B T T"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T W"], KVCache]:
        """As `__call__`, storing every layer's keys and values in an empty cache."""

        def apply(
            block: Block, carry: tuple[jax.Array, KVCache], index: jax.Array
        ) -> tuple[jax.Array, KVCache]:
            x, cache = carry
            q, k, v = block.project(x, positions)
            x = block.finish(x, q, k, v, masks[index % masks.shape[0]])
            return x, cache.write(index, k, v)

        x, cache = fold_layers(self.layers, apply, (x, cache))
        return self.final_norm(x), cache

    def extend(
        self,
        x: Float[Array, "B T W"],
        positions: Int[Array, "B T"],
        masks: Bool[Array, "M B T S"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T W"], KVCache]:
        """Appends T tokens to the cache and lets them look at all slots that `masks` allows."""

        def apply(
            block: Block, carry: tuple[jax.Array, KVCache], index: jax.Array
        ) -> tuple[jax.Array, KVCache]:
            x, cache = carry
            q, k, v = block.project(x, positions)
            cache = cache.write(index, k, v)
            k, v = cache.read(index)
            return block.finish(x, q, k, v, masks[index % masks.shape[0]]), cache

        x, cache = fold_layers(self.layers, apply, (x, cache))
        return self.final_norm(x), cache

    def branch(
        self,
        x: Float[Array, "B T W"],
        positions: Int[Array, "B T"],
        masks: Bool[Array, "M B T keys"],
        cache: KVCache,
    ) -> Float[Array, "B T W"]:
        """As `extend`, but leaves the cache alone: keys are its S slots, then the T tokens."""

        def apply(block: Block, x: jax.Array, index: jax.Array) -> jax.Array:
            q, k, v = block.project(x, positions)
            old_k, old_v = cache.read(index)
            k = jnp.concatenate([old_k, k.astype(old_k.dtype)], axis=2)
            v = jnp.concatenate([old_v, v.astype(old_v.dtype)], axis=2)
            return block.finish(x, q, k, v, masks[index % masks.shape[0]])

        return self.final_norm(fold_layers(self.layers, apply, x))

    def logits(self, x: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """Output logits in float32, soft-capped where the configuration says so."""
        out = self.embedder.decode(x) if self.config.tie_embeddings else self.lm_head(x)
        return soft_cap(out, self.config.final_logit_softcap)
