"""Weights of 8 and 4 bits are widened inside of the product, never in memory."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, Int

from tests.program.target import Target

pytestmark = pytest.mark.program

# [out, in] of the largest and the smallest product of PaliGemma 3B, and of its token table.
MATRICES = [(32768, 2048), (2048, 16384), (2560, 2048), (257152, 2048)]


@jax.jit
def product(
    w: Int[Array, "out of_in"], scale: Float[Array, " out"], x: Float[Array, "rows of_in"]
) -> Float[Array, "rows out"]:
    y = jnp.einsum("oi,ri->ro", w.astype(x.dtype), x, preferred_element_type=jnp.float32)
    return y * scale


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_nothing_is_dequantised_in_memory(
    h200: Target, dtype: type, rows: int, matrix: tuple[int, int]
):
    compiled = h200.compile(
        product,
        jax.ShapeDtypeStruct(matrix, dtype),
        jax.ShapeDtypeStruct(matrix[:1], jnp.float32),
        jax.ShapeDtypeStruct((rows, matrix[1]), jnp.bfloat16),
    )
    kernels = compiled.program.kernels()
    assert len(kernels) <= 2  # the product, and the sum of its parts where it is split
    size = matrix[0] * matrix[1]
    assert not [k.name for k in kernels if any(r.size >= size for r in k.results)]
