"""Products with a matrix of few bits inside of training, where the matrix itself is not trained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from paligemma_jax.models.quantized_matrix import Matrix


@jax.custom_vjp
def frozen_product(matrix: Matrix, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
    """`matrix.product(x)`, whose gradient is for `x` alone.

    Left to itself, JAX would keep what the weights are widened to until the gradient is taken:
    every layer in floats, at once. Here they are widened once more, one layer at a time.
    """
    return matrix.product(x)


def _forward(matrix: Matrix, x: jax.Array) -> tuple[jax.Array, tuple[Matrix, jax.Array]]:
    return matrix.product(x), (matrix, x[:0])  # of `x` only the width and the dtype are needed


def _backward(kept: tuple[Matrix, jax.Array], gradient: jax.Array) -> tuple[Any, jax.Array]:
    matrix, none = kept
    rows = jnp.zeros((gradient.shape[0], none.shape[1]), none.dtype)
    _, pull_back = jax.vjp(matrix.product, rows)
    return jax.tree.map(_zero, matrix), pull_back(gradient)[0]


def _zero(leaf: jax.Array) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)  # what JAX has for gradients of integers


frozen_product.defvjp(_forward, _backward)
