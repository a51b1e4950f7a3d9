"""Products with weights whose contracted axes come last, as matrices are stored for decoding.

A decoding step multiplies few rows by every weight, so it takes as long as reading the weights
does. Rows of the matrix are then read one after the other, and the matrix comes first: on CPUs XLA
multiplies it by eight rows in little more time than by one (the other way round twice as long).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from paligemma_jax.models.backend import on_cpu

FEW_ROWS = 64  # of a product on a CPU, up to which the matrix should come first


def contract(w: Num[Array, "..."], x: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """w [*out, *in] by x [*rows, *in], summed over the `axes` axes of in: f32[*rows, *out].

    Both are multiplied in the dtype of `x` and added up in float32. Integers may be weights too.
    """
    rows, outs = x.shape[: x.ndim - axes], w.shape[: w.ndim - axes]
    width = math.prod(x.shape[x.ndim - axes :])
    # As plain matrices: XLA has fast products on CPUs for nothing else.
    x, w = x.reshape(-1, width), w.astype(x.dtype).reshape(-1, width)
    count = x.shape[0]
    if on_cpu() and count <= FEW_ROWS:
        return _few_rows(w, x).reshape(*rows, *outs)
    return jnp.einsum("oi,ri->ro", w, x, preferred_element_type=jnp.float32).reshape(*rows, *outs)


def _few_rows(w: Float[Array, "O I"], x: Float[Array, "R I"]) -> Float[Array, "R O"]:
    """The product on a CPU with the matrix first, however few the rows are."""
    count = x.shape[0]
    if count == 1 and x.dtype != jnp.float32:
        # XLA widens the whole matrix for a product with one row, not for one with two.
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    y = jnp.einsum("oi,ri->or", w, x, preferred_element_type=jnp.float32)
    if count > 1:  # or XLA would make it the product with the matrix last
        y = jax.lax.optimization_barrier(y)
    return y.T[:count]
