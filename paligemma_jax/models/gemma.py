"""Gemma and Gemma 2 decoders (arXiv 2403.08295, 2408.00118), run over embeddings.

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
from paligemma_jax.models.attention import soft_cap
from paligemma_jax.models.backend import on_cpu
from paligemma_jax.models.cache import KVCache, empty_cache, empty_layers, empty_stacked
from paligemma_jax.models.contraction import contract
from paligemma_jax.models.dropout import Dropout
from paligemma_jax.models.gemma_block import Block, make_block
from paligemma_jax.models.layers import DType, RMSNorm
from paligemma_jax.models.masks import Layer, Mask
from paligemma_jax.models.remat import Remat
from paligemma_jax.models.stacked import KEEP_ALL, fold_layers, scan_layers, stack_layers

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
        x = look_up(self.input_embedding[...], tokens)
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


@jax.custom_jvp
def look_up(table: Float[Array, "V W"], tokens: Int[Array, "B T"]) -> Float[Array, "B T W"]:
    """Rows of the table; on CPUs those of bfloat16 one by one.

    XLA there gathers from a table of bfloat16 by widening all of it to float32, at every step.
    """
    if table.dtype != jnp.bfloat16 or not on_cpu():
        return table[tokens]

    def row(token: jax.Array) -> jax.Array:
        token, inside = jax.lax.optimization_barrier((token, table))  # or all are widened before
        return jax.lax.dynamic_index_in_dim(inside, token, keepdims=False)

    rows = jax.lax.map(row, jnp.clip(tokens.reshape(-1), 0, table.shape[0] - 1))
    return rows.reshape(*tokens.shape, -1)


@look_up.defjvp
def _look_up_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    table, tokens = primals
    return look_up(table, tokens), tangents[0][tokens]


def _logits(x: Float[Array, "B T W"], table: Float[Array, "V W"]) -> Float[Array, "B T V"]:
    return contract(table, x)


class Gemma(nnx.Module):
    """Decoder over embeddings; three ways through: forward, prefill (fills a cache), extend.

    `watch` is forward with a view of its attention. `layers` is one block whose weights are stacked
    on a leading axis, or, after `unroll`, a list of blocks.
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
        self.layers: Block | nnx.List[Block] = stack_layers(
            lambda layer_rngs: make_block(config, layer_rngs, **kw), config.depth, rngs
        )
        self.final_norm = RMSNorm(config.width, **kw)
        if not config.tie_embeddings:
            self.lm_head = Head(config, rngs=rngs, **kw)

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache with nothing in it, stored as the layers are."""
        c = self.config
        empty = empty_layers if isinstance(self.layers, nnx.List) else empty_stacked
        layers = empty(c.depth, batch, c.num_kv_heads, slots, c.head_dim, self.dtype)
        return empty_cache(layers, batch, slots)

    def __call__(
        self,
        x: Float[Array, "B T W"],
        positions: Int[Array, "B T"],
        mask: Mask,
        dropout: Dropout | None = None,
        remat: Remat = KEEP_ALL,
    ) -> Float[Array, "B T W"]:
        """Normalised hidden states of a whole sequence."""

        def apply(block: Block, x: jax.Array, layer: Layer) -> jax.Array:
            q, k, v = block.project(x, positions)
            drop = dropout.at(layer) if dropout else None
            return block.finish(x, q, k, v, mask, layer, drop)

        return self.final_norm(scan_layers(self.layers, apply, x, remat))

    def watch(
        self,
        x: Float[Array, "B T W"],
        positions: Int[Array, "B T"],
        mask: Mask,
        see: Callable[[Seen, jax.Array, Layer], Seen],
        seen: Seen,
    ) -> tuple[Float[Array, "B T W"], Seen]:
        """As `__call__`, folding `seen = see(seen, weights f32[B, N, T, T], layer)` over layers."""

        def apply(
            block: Block, carry: tuple[jax.Array, Seen], layer: Layer
        ) -> tuple[jax.Array, Seen]:
            x, seen = carry
            q, k, v = block.project(x, positions)
            seen = see(seen, block.weights(q, k, mask, layer), layer)
            return block.finish(x, q, k, v, mask, layer), seen

        x, seen = scan_layers(self.layers, apply, (x, seen))
        return self.final_norm(x), seen

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
        """Appends T tokens to the cache and lets them look at all slots that `mask` allows."""

        def apply(
            block: Block, carry: tuple[jax.Array, KVCache], layer: Layer
        ) -> tuple[jax.Array, KVCache]:
            x, cache = carry
            q, k, v = block.project(x, positions)
            cache = cache.write(layer, k, v)
            return block.finish(x, q, *cache.read(layer), mask, layer), cache

        x, cache = fold_layers(self.layers, apply, (x, cache))
        return self.final_norm(x), cache

    def branch(
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
        out = self.embedder.decode(x) if self.config.tie_embeddings else self.lm_head(x)
        return soft_cap(out, self.config.final_logit_softcap)
