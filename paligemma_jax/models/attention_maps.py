"""Summaries of the attention of all layers and heads, for `PaliGemma.hidden_with_attention`.

Letters: B batch, N heads, L layers, S sequence (image tokens, then text), A queries, K keys kept.

Attention weights say where information was read, not why an answer was given: other weights can
give the same answer (arXiv 1902.10186), and what a layer reads has been mixed by those below.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from paligemma_jax.config import GemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.masks import Layer


@dataclasses.dataclass(frozen=True)
class Region:
    """The part of a square of attention weights to keep: some queries, and the first keys."""

    queries: jax.Array  # i32[B, A], places in the sequence
    keys: int
    length: int  # S

    def cut(self, weights: Float[Array, "B ... S S"]) -> Float[Array, "B ... A K"]:
        """The rows and columns of this region, for each head if there is an axis of heads."""
        between = (1,) * (weights.ndim - 3)
        rows = self.queries.reshape(self.queries.shape[0], *between, -1, 1)
        return jnp.take_along_axis(weights[..., : self.keys], rows, axis=-2)


@runtime_checkable
class AttentionSummary(Protocol):
    """Folds over layers: `init`, `update` at every layer, first to last, then `result`."""

    def init(self, config: GemmaConfig, region: Region) -> Any: ...

    def update(
        self, region: Region, state: Any, weights: Float[Array, "B N S S"], layer: Layer
    ) -> Any: ...

    def result(self, region: Region, state: Any) -> Float[Array, "B ... A K"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanAttention:
    """The mean over some layers and heads; None is all of them, -1 the last one."""

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def init(self, config: GemmaConfig, region: Region) -> tuple[jax.Array, jax.Array]:
        """Each layer's fraction of the mean, and the mean so far; raises ConfigError."""
        fractions = np.zeros(config.depth, np.float32)
        fractions[_chosen("layer", self.layers, config.depth)] = 1
        _chosen("head", self.heads, config.num_heads)
        rows, queries = region.queries.shape
        return jnp.asarray(fractions / fractions.sum()), jnp.zeros((rows, queries, region.keys))

    def update(
        self,
        region: Region,
        state: tuple[jax.Array, jax.Array],
        weights: Float[Array, "B N S S"],
        layer: Layer,
    ) -> tuple[jax.Array, jax.Array]:
        fractions, mean = state
        heads = _chosen("head", self.heads, weights.shape[1])
        return fractions, mean + fractions[layer] * jnp.mean(region.cut(weights)[:, heads], axis=1)

    def result(self, region: Region, state: tuple[jax.Array, jax.Array]) -> Float[Array, "B A K"]:
        return state[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRollout:
    """Attention followed through the layers down to the input embeddings (arXiv 2005.00928).

    The product over layers of (A + 1) / 2, A the mean over heads. It counts residual connections as
    half of what a layer passes on and leaves out values, norms and MLPs.
    """

    def init(self, config: GemmaConfig, region: Region) -> jax.Array:
        eye = jnp.eye(region.length)
        return jnp.broadcast_to(eye, (region.queries.shape[0], *eye.shape))

    def update(
        self,
        region: Region,
        state: Float[Array, "B S S"],
        weights: Float[Array, "B N S S"],
        layer: Layer,
    ) -> Float[Array, "B S S"]:
        return (jnp.einsum("BTS,BSU->BTU", jnp.mean(weights, axis=1), state) + state) / 2

    def result(self, region: Region, state: Float[Array, "B S S"]) -> Float[Array, "B A K"]:
        return region.cut(state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryHead:
    """The weights of each layer and head, [B, L, N, A, K]."""

    def init(self, config: GemmaConfig, region: Region) -> jax.Array:
        rows, queries = region.queries.shape
        return jnp.zeros((config.depth, rows, config.num_heads, queries, region.keys))

    def update(
        self,
        region: Region,
        state: Float[Array, "L B N A K"],
        weights: Float[Array, "B N S S"],
        layer: Layer,
    ) -> Float[Array, "L B N A K"]:
        return state.at[layer].set(region.cut(weights))

    def result(self, region: Region, state: Float[Array, "L B N A K"]) -> Float[Array, "B L N A K"]:
        return state.swapaxes(0, 1)


def _chosen(what: str, numbers: tuple[int, ...] | None, count: int) -> np.ndarray:
    """The numbers counted from 0; all if None."""
    if numbers is None:
        return np.arange(count)
    if not numbers or not all(-count <= number < count for number in numbers):
        raise ConfigError(
            f"Expected {what}s from 0 to {count - 1}, or from -{count} to -1 counted from the end, "
            f"got {numbers!r}."
        )
    return np.unique(np.asarray(numbers) % count)
