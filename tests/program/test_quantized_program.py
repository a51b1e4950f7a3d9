"""Weights of 8 and 4 bits are widened inside of the product, never in memory."""

import functools

import jax
import pytest

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.quantization_config import Int4, Int8, QuantizationConfig, QuantizedFormat
from tests.program.ours import decode, encode, model_of, prefill, quantized_product, variant
from tests.program.target import Compiled, Target

pytestmark = pytest.mark.program

# [out, in] of the largest and the smallest products of PaliGemma 3B, and of its token table.
MATRICES = [(32768, 2048), (2048, 16384), (2560, 2048), (257152, 2048)]
# Those of PaliGemma 2 3B that XLA splits along what it adds up.
OF_2 = [(2304, 9216), (4096, 2304), (18432, 2304)]
MODELS = ["paligemma-3b-pt-224", "paligemma2-3b-pt-224"]
CHANNELS = [Int8(), Int4(group=None)]
GROUPS = [(Int4(), 1), (Int4(), 8)]
CASES = [
    *[(format, matrix, rows) for format in CHANNELS for matrix in MATRICES for rows in (1, 8, 64)],
    *[(Int4(), matrix, rows) for matrix in [*MATRICES, *OF_2] for rows in (1, 8, 64, 288)],
    *[(Int4(group=128), matrix, rows) for matrix in MATRICES for rows in (1, 64)],
]


@functools.cache
def _decode(target: Target, name: str, batch: int, format: Int8 | Int4, layers: int) -> Compiled:
    return decode(target, variant(name, layers=layers), batch, format)


@pytest.mark.parametrize(("format", "matrix", "rows"), CASES, ids=str)
def test_nothing_is_dequantised_in_memory(
    h200: Target, format: QuantizedFormat, rows: int, matrix: tuple[int, int]
):
    kernels = quantized_product(h200, format, matrix, rows).program.kernels()
    assert len(kernels) <= 2  # the product, and the sum of its parts where it is split
    size = matrix[0] * matrix[1]
    assert not [k.name for k in kernels if any(r.size >= size for r in k.results)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("format", "batch"), [*((f, 1) for f in CHANNELS), *GROUPS], ids=str)
def test_decoding_widens_no_weight(h200: Target, format: Int8 | Int4, batch: int, name: str):
    config = variant(name, layers=4)
    compiled = _decode(h200, name, batch, format, 4)
    assert _widened(compiled, config) == []
    assert compiled.temporaries - 4 * batch * config.llm.vocab_size < 4e6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("format", "batch"), GROUPS, ids=str)
def test_groups_cost_no_kernels(h200: Target, format: Int8 | Int4, batch: int, name: str):
    few, more = (_decode(h200, name, batch, format, layers).program for layers in (4, 6))
    assert (len(more.kernels()) - len(few.kernels())) / 2 <= 18  # a layer


@pytest.mark.parametrize("name", MODELS)
def test_reading_a_prompt_widens_no_weight(h200: Target, name: str):
    config = variant(name, layers=4)
    assert _widened(prefill(h200, config, 1, Int4()), config) == []


def test_the_image_encoder_widens_no_weight(h200: Target):
    config = variant(MODELS[0], layers=4)
    compiled = encode(
        h200, config, 3, QuantizationConfig(image=Int8())
    )  # no activation is a weight's size
    sizes = {leaf.size for leaf in jax.tree.leaves(model_of(config).img) if leaf.size > 1e6}
    written = [r for k in compiled.program.kernels() for r in k.results if r.size in sizes]
    assert sizes and not written


def _widened(compiled: Compiled, config: PaliGemmaConfig) -> list[str]:
    """Kernels that write something as large as one of the decoder's matrices."""
    sizes = {leaf.size for leaf in jax.tree.leaves(model_of(config).llm) if leaf.size > 1e6}
    kernels = compiled.program.kernels()
    return [k.name for k in kernels if any(r.size in sizes for r in k.results)]
