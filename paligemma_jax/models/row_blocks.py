"""Products of matrices that must be widened first, a block of their rows at a time.

XLA on CPUs widens a whole matrix in memory before it multiplies it: many times the work of reading
the matrix. A block stays in the cache.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

BLOCK = 2 << 20  # weights: 8 MB in float32; 2 and 16 MB took CPUs twice as long


def in_row_blocks(
    product: Callable[..., Shaped[Array, "rows R"]],
    *arrays: Shaped[Array, "O ..."],
    columns: int,
) -> Shaped[Array, "O R"]:
    """`product(*arrays)` of some rows of the arrays at a time; `columns` weights are in a row."""
    count = arrays[0].shape[0]
    blocks = -(-count * columns // BLOCK)
    if blocks <= 1:
        return product(*arrays)
    size = min(-(-count // (64 * blocks)) * 64, count)
    last = count - size  # the last block overlaps the one before it

    def block(number: jax.Array) -> jax.Array:
        start = jnp.minimum(number * size, last)
        return product(*(jax.lax.dynamic_slice_in_dim(a, start, size) for a in arrays))

    blocks = -(-count // size)
    out = jax.lax.map(block, jnp.arange(blocks))
    if blocks * size == count:
        return out.reshape(count, -1)
    whole = out[:-1].reshape((blocks - 1) * size, -1)
    return jnp.concatenate([whole, out[-1, whole.shape[0] - last :]])
