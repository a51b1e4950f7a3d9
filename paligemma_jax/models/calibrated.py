"""Rounding that makes up for itself, by what a matrix is multiplied with: GPTQ (arXiv 2210.17323).

Letters: O output channels, I inputs, G groups of inputs with a scale each, S inputs of a group.
"""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float, Int

from paligemma_jax.models.integers import fit_rows
from paligemma_jax.models.layers import DType

_DAMPING = 0.01  # of the mean second moment: inputs that never vary would divide by 0


def fit_rows_to_inputs(
    matrix: Float[Array, "O I"],
    moments: Float[Array, "I I"],
    bits: int,
    groups: int = 1,
    scale_dtype: DType = jnp.float32,
) -> tuple[Int[Array, "O I"], Float[Array, "O G"]]:
    """As `fit_rows`, with less error of the product instead of the matrix.

    `moments` are sums of x_i x_j over the inputs x it will see. Inputs are rounded one after the
    other, and what one loses is given to those that are left, as far as they vary with it.
    """
    lowest = -(2 ** (bits - 1))
    inputs = matrix.shape[1]
    size = inputs // groups
    upper = _factor(moments)

    def round_group(
        left: Float[Array, "O I"], start: Int[Array, ""]
    ) -> tuple[Float[Array, "O I"], tuple[Int[Array, "O S"], Float[Array, "O"]]]:  # noqa: F821
        columns = jax.lax.dynamic_slice_in_dim(left, start, size, axis=1)
        below = jax.lax.dynamic_slice_in_dim(upper, start, size)
        among = jax.lax.dynamic_slice_in_dim(below, start, size, axis=1)
        scale = fit_rows(columns, bits, 1, scale_dtype)[1][:, 0]
        step = scale.astype(jnp.float32)

        def round_column(
            j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            columns, integers, lost = carry
            column = columns[:, j]
            rounded = jnp.clip(jnp.round(column / step), lowest, -lowest - 1)
            loss = (column - rounded * step) / among[j, j]
            columns = columns - loss[:, None] * among[j][None]  # 0 for those that are done
            return columns, integers.at[:, j].set(rounded), lost.at[:, j].set(loss)

        zeros = jnp.zeros_like(columns)
        _, integers, lost = jax.lax.fori_loop(0, size, round_column, (columns, zeros, zeros))
        return left - lost @ below, (integers.astype(jnp.int8), scale)

    starts = jnp.arange(0, inputs, size)
    _, (integers, scale) = jax.lax.scan(round_group, matrix.astype(jnp.float32), starts)
    return integers.transpose(1, 0, 2).reshape(matrix.shape), scale.T


def _factor(moments: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """Upper triangular U with U^T U the inverse of the damped moments."""
    size = moments.shape[0]
    mean = jnp.trace(moments) / size
    unit = jnp.where(mean > 0, mean, 1.0)  # or small moments would vanish in float32
    damped = moments.astype(jnp.float32) / unit + _DAMPING * jnp.eye(size)
    inverse = cho_solve((jnp.linalg.cholesky(damped), True), jnp.eye(size))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T
