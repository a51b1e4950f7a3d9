"""Weights of 8 and 4 bits are widened inside of the product, never in memory."""

import jax
import pytest

from paligemma_jax.models.recipe import Format, Int4, Int8
from tests.program.ours import decode, model_of, quantized_product, variant
from tests.program.target import Target

pytestmark = pytest.mark.program

# [out, in] of the largest and the smallest products of PaliGemma 3B, and of its token table.
MATRICES = [(32768, 2048), (2048, 16384), (2560, 2048), (257152, 2048)]
CHANNELS = [Int8(), Int4(group=None)]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("format", CHANNELS, ids=str)
def test_nothing_is_dequantised_in_memory(
    h200: Target, format: Format, rows: int, matrix: tuple[int, int]
):
    kernels = quantized_product(h200, format, matrix, rows).program.kernels()
    assert len(kernels) <= 2  # the product, and the sum of its parts where it is split
    size = matrix[0] * matrix[1]
    assert not [k.name for k in kernels if any(r.size >= size for r in k.results)]


@pytest.mark.parametrize("matrix", MATRICES[:3])
@pytest.mark.parametrize(
    "rows",
    [1, 8, pytest.param(64, marks=pytest.mark.xfail(reason="the scaled matrix is written once"))],
)
def test_nothing_is_dequantised_in_memory_in_groups(
    h200: Target, rows: int, matrix: tuple[int, int]
):
    kernels = quantized_product(h200, Int4(), matrix, rows).program.kernels()
    size = matrix[0] * matrix[1]
    assert not [k.name for k in kernels if any(r.size >= size for r in k.results)]


@pytest.mark.parametrize("name", ["paligemma-3b-pt-224", "paligemma2-3b-pt-224"])
@pytest.mark.parametrize("format", CHANNELS, ids=str)
def test_decoding_widens_no_weight(h200: Target, format: Int8 | Int4, name: str):
    config = variant(name, layers=4)
    compiled = decode(h200, config, 1, format)
    weights = [leaf.size for leaf in jax.tree.leaves(model_of(config).llm) if leaf.size > 1e6]
    kernels = compiled.program.kernels()
    assert not [k.name for k in kernels if any(r.size >= min(weights) for r in k.results)]
    assert compiled.temporaries - 4 * config.llm.vocab_size < 4e6
