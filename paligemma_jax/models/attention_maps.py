"""What to keep of the attention of all layers and heads: small frozen rules for `watch`.

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
    """Folds over layers: `start`, `see` at every layer, first to last, then `finish`."""

    def start(self, config: GemmaConfig, region: Region) -> Any: ...

    def see(
        self, region: Region, seen: Any, weights: Float[Array, "B N S S"], layer: Layer
    ) -> Any: ...

    def finish(self, region: Region, seen: Any) -> Float[Array, "B ... A K"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanAttention:
    """The mean over some layers and heads; None is all of them, -1 the last one."""

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def start(self, config: GemmaConfig, region: Region) -> tuple[jax.Array, jax.Array]:
        """Each layer's share of the mean, and the mean so far; raises ConfigError."""
        share = np.zeros(config.depth, np.float32)
        share[_chosen("layer", self.layers, config.depth)] = 1
        _chosen("head", self.heads, config.num_heads)
        rows, queries = region.queries.shape
        return jnp.asarray(share / share.sum()), jnp.zeros((rows, queries, region.keys))

    def see(
        self,
        region: Region,
        seen: tuple[jax.Array, jax.Array],
        weights: Float[Array, "B N S S"],
        layer: Layer,
    ) -> tuple[jax.Array, jax.Array]:
        share, mean = seen
        heads = _chosen("head", self.heads, weights.shape[1])
        return share, mean + share[layer] * jnp.mean(region.cut(weights)[:, heads], axis=1)

    def finish(self, region: Region, seen: tuple[jax.Array, jax.Array]) -> Float[Array, "B A K"]:
        return seen[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRollout:
    """Attention followed through the layers down to the input embeddings (arXiv 2005.00928).

    The product over layers of (A + 1) / 2, A the mean over heads. It counts residual connections as
    half of what a layer passes on and leaves out values, norms and MLPs.
    """

    def start(self, config: GemmaConfig, region: Region) -> jax.Array:
        eye = jnp.eye(region.length)
        return jnp.broadcast_to(eye, (region.queries.shape[0], *eye.shape))

    def see(
        self,
        region: Region,
        seen: Float[Array, "B S S"],
        weights: Float[Array, "B N S S"],
        layer: Layer,
    ) -> Float[Array, "B S S"]:
        return (jnp.einsum("BTS,BSU->BTU", jnp.mean(weights, axis=1), seen) + seen) / 2

    def finish(self, region: Region, seen: Float[Array, "B S S"]) -> Float[Array, "B A K"]:
        return region.cut(seen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryHead:
    """Nothing summed up: the weights of each layer and head, [B, L, N, A, K]."""

    def start(self, config: GemmaConfig, region: Region) -> jax.Array:
        rows, queries = region.queries.shape
        return jnp.zeros((config.depth, rows, config.num_heads, queries, region.keys))

    def see(
        self,
        region: Region,
        seen: Float[Array, "L B N A K"],
        weights: Float[Array, "B N S S"],
        layer: Layer,
    ) -> Float[Array, "L B N A K"]:
        return seen.at[layer].set(region.cut(weights))

    def finish(self, region: Region, seen: Float[Array, "L B N A K"]) -> Float[Array, "B L N A K"]:
        return seen.swapaxes(0, 1)


def _chosen(what: str, numbers: tuple[int, ...] | None, count: int) -> np.ndarray:
    """The numbers counted from 0; all if None."""
    if numbers is None:
        return np.arange(count)
    if not numbers or not all(-count <= number < count for number in numbers):
        raise ConfigError(
            f"{what}s={numbers!r} does not fit a decoder of {count} {what}s. Numbers from 0 to "
            f"{count - 1}, or from -{count} to -1 counted from the end, fit. Choose for example "
            f"MeanAttention({what}s=({count - 1},))."
        )
    return np.unique(np.asarray(numbers) % count)
