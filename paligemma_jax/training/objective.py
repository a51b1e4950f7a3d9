"""The loss of hidden states, without ever holding the logits of a whole batch.

Only supervised positions are multiplied by the token table, some columns of all rows at a time, and
a gradient computes those logits again. So memory is that of a few columns: B * columns * V floats.

Letters: B batch, T tokens, S columns of supervised tokens, W width, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from paligemma_jax.training.losses import token_nll

Mean = Callable[[jax.Array, jax.Array | None], jax.Array]
Logits = Callable[[jax.Array], jax.Array]


def example_mean(
    mask_loss: Num[Array, "B T"], row_mask: Bool[Array, " B"] | None = None
) -> Float[Array, "B T"]:
    """Weights for the mean over examples of the mean over their tokens: big_vision's.

    An example without supervised tokens counts, with a loss of zero; a row that only fills the
    batch (`row_mask` False) does not.
    """
    mask = _real(mask_loss, row_mask)
    rows = mask.shape[0] if row_mask is None else jnp.maximum(jnp.sum(row_mask), 1)
    return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1) / rows


def token_mean(
    mask_loss: Num[Array, "B T"], row_mask: Bool[Array, " B"] | None = None
) -> Float[Array, "B T"]:
    """Weights for the mean over all supervised tokens, so that long answers count more."""
    mask = _real(mask_loss, row_mask)
    return mask / jnp.maximum(jnp.sum(mask), 1)


def _real(mask_loss: jax.Array, row_mask: jax.Array | None) -> jax.Array:
    mask = mask_loss.astype(jnp.float32)
    return mask if row_mask is None else mask * row_mask[:, None]


def weighted_loss(
    logits: Logits,
    hidden: Float[Array, "B T W"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
    columns: int = 32,
    most: int | None = None,
) -> Float[Array, ""]:
    """Sum of `weights` times cross-entropy in nats; positions of weight zero add nothing.

    `logits` is the output head, f[B, S, W] -> f32[B, S, V]; it sees `columns` tokens of each row at
    a time. `most` bounds how many a row has with a weight, and no others are looked at; a row with
    more makes the loss NaN, for nothing may be left out in silence.
    """
    length = targets.shape[1]
    size = length if most is None else min(most, length)
    if size < length:  # the supervised ones first, in their order
        place = jnp.argsort(weights == 0, axis=1, stable=True)
        cut = jnp.sum(weights != 0, axis=1) > size
        weights = jnp.where(jnp.any(cut), jnp.nan, jnp.take_along_axis(weights, place, axis=1))
        hidden = jnp.take_along_axis(hidden, place[:, :size, None], axis=1)
        targets = jnp.take_along_axis(targets, place[:, :size], axis=1)
        weights = weights[:, :size]

    @jax.checkpoint
    def loss(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(token_nll(logits(hidden), targets, label_smoothing) * weights)

    if size <= columns:
        return loss(hidden, targets, weights)

    # Not skipped where nothing is supervised: `lax.cond` would keep a copy of the table a chunk.
    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + loss(*chunk), None

    chunks = tuple(_chunks(x, columns) for x in (hidden, targets, weights))
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)[0]


def _chunks(x: jax.Array, columns: int) -> jax.Array:
    """[B, S, ...] -> [chunks, B, columns, ...], padded with zeros."""
    rows, size = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -size % columns), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(rows, -1, columns, *x.shape[2:]), 1, 0)
