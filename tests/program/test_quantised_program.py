"""Weights of 8 and 4 bits are widened inside of the product, never in memory."""

import jax
import jax.numpy as jnp
import pytest

from paligemma_jax.models.quantized_matrix import Matrix
from paligemma_jax.models.recipe import Format, Int4, Int8
from tests.program.target import Compiled, Target

pytestmark = pytest.mark.program

# [out, in] of the largest and the smallest product of PaliGemma 3B, and of its token table.
MATRICES = [(32768, 2048), (2048, 16384), (2560, 2048), (257152, 2048)]


@jax.jit
def product(matrix: Matrix, x: jax.Array) -> jax.Array:
    return matrix.product(x)


def compiled(
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
    format: Format,
    rows: int,
    shape: tuple[int, int],
) -> Compiled:
    """The product of so many rows with a matrix as it is stored on a GPU."""
    with monkeypatch.context() as m:
        m.setattr(jax, "default_backend", lambda: "gpu")
        matrix = jax.eval_shape(format.store, jax.ShapeDtypeStruct(shape, jnp.float32))
    return target.compile(product, matrix, jax.ShapeDtypeStruct((rows, shape[1]), jnp.bfloat16))


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("format", [Int8(), Int4(None)], ids=str)
def test_nothing_is_dequantised_in_memory(
    h200: Target, monkeypatch: pytest.MonkeyPatch, format: Format, rows: int, shape: tuple[int, int]
):
    kernels = compiled(h200, monkeypatch, format, rows, shape).program.kernels()
    assert len(kernels) <= 2  # the product, and the sum of its parts where it is split
    size = shape[0] * shape[1]
    assert not [k.name for k in kernels if any(r.size >= size for r in k.results)]


@pytest.mark.parametrize("shape", MATRICES[:3])
@pytest.mark.parametrize("rows", [1, 8])
def test_groups_of_few_rows_are_summed_apart(
    h200: Target, monkeypatch: pytest.MonkeyPatch, rows: int, shape: tuple[int, int]
):
    """What is written is a float32 sum for each row and group of 128 weights."""
    found = compiled(h200, monkeypatch, Int4(), rows, shape)
    size = shape[0] * shape[1]
    results = [r.size for k in found.program.kernels() for r in k.results]
    sums = rows * size // 128
    assert max(results) <= sums
    assert found.temporaries <= 1.2 * 4 * sums
