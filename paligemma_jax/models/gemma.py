"""Gemma and Gemma 2 decoders (arXiv 2403.08295, 2408.00118), run over embeddings.

A layer exists with weights as they are trained (`Attention`, `FeedForward`) and as they are stored
for decoding (`FusedAttention`, `FusedFeedForward`): queries, keys and values from one matmul, both
gates of the MLP from another, contracted axes last. The numbers are the same.

Letters: B batch, T tokens, S cache slots, W width, F MLP width, N query heads, K key-value heads,
H head width, V vocabulary, L layers.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from paligemma_jax.config import GemmaConfig
from paligemma_jax.models.attention import attention, attention_weights, rotary_embedding, soft_cap
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.layers import (
    Dropout,
    DType,
    Remat,
    RMSNorm,
    contract,
    fold_layers,
    init_stacked,
    on_cpu,
    scan_layers,
)
from paligemma_jax.models.linear import Einsum, EinsumAxes, Linear, Projection
from paligemma_jax.models.masks import Layer, Mask


class Attention(nnx.Module):
    """Projections around grouped-query attention, one weight each as in big_vision."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        c = config
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.query_scale = c.query_scale
        heads, width, size = c.num_heads, c.width, c.head_dim
        self.q_einsum = Einsum((heads, width, size), EinsumAxes((1,)), **kw)
        kv_axes = EinsumAxes((2,), parts=("k", "v"))
        self.kv_einsum = Einsum((2, c.num_kv_heads, width, size), kv_axes, **kw)
        self.attn_vec_einsum = Einsum((heads, size, width), EinsumAxes((0, 1)), **kw)

    def project(
        self, x: Float[Array, "B T W"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Rotated and scaled queries, rotated keys, values."""
        q = rotary_embedding(self.q_einsum("BTW,NWH->BTNH", x), positions)
        k, v = self.kv_einsum("BTW,CKWH->CBTKH", x)
        k = rotary_embedding(k, positions)
        return q * self.query_scale, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def output(self, mixed: Float[Array, "B T N H"]) -> Float[Array, "B T W"]:
        """What attention gives, in the model's width."""
        return self.attn_vec_einsum("BTNH,NHW->BTW", mixed)


class FeedForward(nnx.Module):
    """Gated GELU (arXiv 2002.05202): gate 0 is activated, gate 1 is linear."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        gates = EinsumAxes((1,), parts=("gate", "up"))
        self.gating_einsum = Einsum((2, config.width, config.mlp_dim), gates, **kw)
        self.linear = Einsum((config.mlp_dim, config.width), EinsumAxes((0,)), **kw)

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        gate, up = self.gating_einsum("BTW,CWF->CBTF", x)
        return self.linear("BTF,FW->BTW", jax.nn.gelu(gate, approximate=True) * up)


class Block(nnx.Module):
    """One decoder layer; Gemma 2 normalizes again after attention and after the MLP."""

    def __init__(
        self,
        config: GemmaConfig,
        attn: "Attention | FusedAttention",
        mlp: "FeedForward | FusedFeedForward",
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
        """Attention weights of the values, head by head, in float32."""
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
        """The rest of the layer, given the keys and values to attend to.

        Dropout is big_vision's: after the second norm of attention, before that of the MLP.
        """
        mixed = attention(q, k.astype(q.dtype), v.astype(q.dtype), mask, layer, self.softcap)
        h = self.attn.output(mixed)
        h = self.post_attention_norm(h) if self.post_norms else h
        x = x + (dropout.fold_in(0)(h) if dropout else h)
        h = self.mlp(self.pre_ffw_norm(x))
        h = dropout.fold_in(1)(h) if dropout else h
        return x + (self.post_ffw_norm(h) if self.post_norms else h)


def make_block(config: GemmaConfig, rngs: nnx.Rngs, *, dtype: DType, param_dtype: DType) -> Block:
    """A layer with new random weights."""
    kw = dict(dtype=dtype, param_dtype=param_dtype)
    attn = Attention(config, rngs=rngs, **kw)
    return Block(config, attn, FeedForward(config, rngs=rngs, **kw), **kw)


State = TypeVar("State")


class Head(Linear):
    """One row for each token: an output head of its own, or what `Embedder` adds lookups to."""

    w: nnx.Param

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        self.shape, self.axes = (config.vocab_size, config.width), EinsumAxes((1,))
        self.dtype = dtype
        init = jax.random.normal(rngs.params(), self.shape) * config.width**-0.5
        setattr(self, self.weight_name, nnx.Param(init.astype(param_dtype)))

    def logits(self, x: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """Of every token, in float32."""
        if self.matrix is None:
            return contract(getattr(self, self.weight_name)[...], x)
        return self._quantized_matmul(x, 1)


class Embedder(Head):
    """The embedding table: looked up and scaled by sqrt(W) going in, tied output head going out."""

    weight_name = "input_embedding"
    input_embedding: nnx.Param

    def encode(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """Scaled embeddings; the scale is rounded to the table's dtype, as in big_vision."""
        if self.matrix is None:
            x = look_up(self.input_embedding[...], tokens)
        else:
            x = self.matrix.take(tokens).astype(self.dtype)
        return (x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)).astype(self.dtype)


@jax.custom_jvp
def look_up(table: Float[Array, "V W"], tokens: Int[Array, "B T"]) -> Float[Array, "B T W"]:
    """Rows of the table; on CPUs those of bfloat16 one by one.

    XLA there gathers from a table of bfloat16 by upcasting all of it to float32, at every step.
    """
    if table.dtype != jnp.bfloat16 or not on_cpu():
        return table[tokens]

    def row(token: jax.Array) -> jax.Array:
        token, inside = jax.lax.optimization_barrier((token, table))  # or all are upcast before
        return jax.lax.dynamic_index_in_dim(inside, token, keepdims=False)

    rows = jax.lax.map(row, jnp.clip(tokens.reshape(-1), 0, table.shape[0] - 1))
    return rows.reshape(*tokens.shape, -1)


@look_up.defjvp
def _look_up_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    table, tokens = primals
    return look_up(table, tokens), tangents[0][tokens]


class Gemma(nnx.Module):
    """Decoder over embeddings; three ways through: forward, prefill (fills a cache), extend.

    `with_attention` is forward with its attention weights. `layers` is one block whose weights are
    stacked on a leading axis, or, after `unstack_layers`, a list of blocks.
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
        self.dtype = dtype
        self.embedder = Embedder(config, rngs=rngs, **kw)
        self.layers: Block | nnx.List[Block] = init_stacked(
            lambda layer_rngs: make_block(config, layer_rngs, **kw), config.depth, rngs
        )
        self.final_norm = RMSNorm(config.width, **kw)
        if not config.tie_embeddings:
            self.lm_head = Head(config, rngs=rngs, **kw)

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache with nothing in it, stored as the layers are."""
        c, stacked = self.config, not isinstance(self.layers, nnx.List)
        return KVCache.empty(
            c.depth, batch, c.num_kv_heads, slots, c.head_dim, self.dtype, stacked=stacked
        )

    def __call__(
        self,
        x: Float[Array, "B T W"],
        positions: Int[Array, "B T"],
        mask: Mask,
        dropout: Dropout | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B T W"]:
        """Normalized hidden states of a whole sequence."""

        def apply(block: Block, x: jax.Array, layer: Layer) -> jax.Array:
            q, k, v = block.project(x, positions)
            drop = dropout.fold_in(layer) if dropout else None
            return block.finish(x, q, k, v, mask, layer, drop)

        return self.final_norm(scan_layers(self.layers, apply, x, remat))

    def with_attention(
        self,
        x: Float[Array, "B T W"],
        positions: Int[Array, "B T"],
        mask: Mask,
        update: Callable[[State, jax.Array, Layer], State],
        state: State,
    ) -> tuple[Float[Array, "B T W"], State]:
        """As `__call__`, with `state = update(state, weights f32[B, N, T, T], layer)` at each."""

        def apply(
            block: Block, carry: tuple[jax.Array, State], layer: Layer
        ) -> tuple[jax.Array, State]:
            x, state = carry
            q, k, v = block.project(x, positions)
            state = update(state, block.weights(q, k, mask, layer), layer)
            return block.finish(x, q, k, v, mask, layer), state

        x, state = scan_layers(self.layers, apply, (x, state))
        return self.final_norm(x), state

    def prefill(
        self, x: Float[Array, "B T W"], positions: Int[Array, "B T"], mask: Mask, cache: KVCache
    ) -> tuple[Float[Array, "B T W"], KVCache]:
        """As `__call__`, storing every layer's keys and values in an empty cache."""

        def apply(
            block: Block, carry: tuple[jax.Array, KVCache], layer: Layer
        ) -> tuple[jax.Array, KVCache]:
            x, cache = carry
            q, k, v = block.project(x, positions)
            return block.finish(x, q, k, v, mask, layer), cache.write(layer, k, v)

        x, cache = fold_layers(self.layers, apply, (x, cache))
        return self.final_norm(x), cache

    def extend(
        self, x: Float[Array, "B T W"], positions: Int[Array, "B T"], mask: Mask, cache: KVCache
    ) -> tuple[Float[Array, "B T W"], KVCache]:
        """Appends T tokens to the cache and lets them attend to all slots that `mask` allows."""

        def apply(
            block: Block, carry: tuple[jax.Array, KVCache], layer: Layer
        ) -> tuple[jax.Array, KVCache]:
            x, cache = carry
            q, k, v = block.project(x, positions)
            cache = cache.write(layer, k, v)
            return block.finish(x, q, *cache.read(layer), mask, layer), cache

        x, cache = fold_layers(self.layers, apply, (x, cache))
        return self.final_norm(x), cache

    def continuations(
        self, x: Float[Array, "B T W"], positions: Int[Array, "B T"], mask: Mask, cache: KVCache
    ) -> Float[Array, "B T W"]:
        """As `extend`, but leaves the cache alone: keys are its S slots, then the T tokens."""

        def apply(block: Block, x: jax.Array, layer: Layer) -> jax.Array:
            q, k, v = block.project(x, positions)
            old_k, old_v = cache.read(layer)
            k = jnp.concatenate([old_k, k.astype(old_k.dtype)], axis=2)
            v = jnp.concatenate([old_v, v.astype(old_v.dtype)], axis=2)
            return block.finish(x, q, k, v, mask, layer)

        return self.final_norm(fold_layers(self.layers, apply, x))

    def logits(self, x: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """Output logits in float32, soft-capped where the configuration says so."""
        head = self.embedder if self.config.tie_embeddings else self.lm_head
        return soft_cap(head.logits(x), self.config.final_logit_softcap)


class FusedAttention(nnx.Module):
    """Queries, then keys, then values from one weight; see `Attention`."""

    def __init__(self, config: GemmaConfig, *, dtype: DType, param_dtype: DType):
        c = config
        kw = dict(dtype=dtype, w=param_dtype)
        self.config = c
        self.qkv = Projection((c.num_heads + 2 * c.num_kv_heads, c.head_dim), (c.width,), **kw)
        self.out = Projection((c.width,), (c.num_heads, c.head_dim), **kw)

    def project(
        self, x: Float[Array, "B T W"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """See `Attention`."""
        c = self.config
        heads = self.qkv(x).astype(x.dtype)
        rotated = rotary_embedding(heads[:, :, : c.num_heads + c.num_kv_heads], positions)
        q, k = jnp.split(rotated, [c.num_heads], axis=2)
        v = heads[:, :, c.num_heads + c.num_kv_heads :]
        return q * c.query_scale, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def output(self, mixed: Float[Array, "B T N H"]) -> Float[Array, "B T W"]:
        """See `Attention`."""
        return self.out(mixed).astype(mixed.dtype)


class FusedFeedForward(nnx.Module):
    """Gated GELU with both gates from one matmul; see `FeedForward`."""

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
