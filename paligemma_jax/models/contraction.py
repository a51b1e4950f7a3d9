"""Products with weights whose contracted axes come last, as matrices are stored for decoding.

A decoding step multiplies few rows by every weight, so it takes as long as reading the weights
does. Rows of the matrix are then read one after the other, and the matrix comes first: on CPUs XLA
multiplies it by eight rows in little more time than by one (the other way round twice as long).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def contract(w: Float[Array, "..."], x: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """w [*out, *in] by x [*rows, *in], summed over the `axes` axes of in: f32[*rows, *out].

    Both are multiplied in the dtype of `x` and added up in float32.
    """
    rows, w = x.shape[: x.ndim - axes], w.astype(x.dtype)
    x = x.reshape(-1, *x.shape[x.ndim - axes :])
    count = x.shape[0]
    if count == 1 and x.dtype != jnp.float32 and jax.default_backend() == "cpu":
        # XLA widens the whole matrix for a product with one row, not for one with two.
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    contracted = tuple(range(w.ndim - axes, w.ndim)), tuple(range(1, 1 + axes))
    y = jax.lax.dot_general(w, x, (contracted, ((), ())), preferred_element_type=jnp.float32)
    return jnp.moveaxis(y[..., :count], -1, 0).reshape(*rows, *w.shape[: w.ndim - axes])
