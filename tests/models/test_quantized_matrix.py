"""Products with matrices of few bits: close to those of the matrix, exact for what is stored."""

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.models import layers as backend
from paligemma_jax.models import layers as row_blocks
from paligemma_jax.models.quantization_config import (
    Float8,
    Int4,
    Int8,
    Int8Dynamic,
    QuantizationConfig,
    QuantizedFormat,
)
from paligemma_jax.models.quantized_matrix import QuantizedMatrix, quantize_matrix

ROWS = (1, 2, 8, 17, 40)
rng = np.random.default_rng(0)
MATRIX = rng.normal(size=(300, 256)).astype(np.float32)
INPUTS = rng.normal(size=(max(ROWS), 256)).astype(np.float32)
# What rounding may do to a product, over the norms of row and matrix row: the worst of 12,000.
BOUNDS = {
    Int8(): 0.003,
    Float8(): 0.01,
    Int8Dynamic(): 0.004,
    Int4(): 0.025,
    Int4(None): 0.03,
    Int4(128): 0.03,
}


def stored(format: QuantizedFormat) -> np.ndarray:
    """The matrix as it is after rounding."""
    return np.asarray(quantize_matrix(jnp.asarray(MATRIX), format).take(jnp.arange(len(MATRIX))))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_blocks, "BLOCK", 64 * 256)


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of programs can run here."""
    monkeypatch.setattr(backend, "backend", lambda: request.param)
    return request.param


@pytest.mark.parametrize("format", BOUNDS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_product(device: str, format: QuantizedFormat, rows: int):
    x = INPUTS[:rows]
    y = quantize_matrix(jnp.asarray(MATRIX), format).matmul(jnp.asarray(x))
    assert y.dtype == jnp.float32 and y.shape == (rows, 300)
    if not isinstance(format, Int8Dynamic):
        np.testing.assert_allclose(y, x @ stored(format).T, atol=2e-4)
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(MATRIX, axis=1)
    assert np.max(np.abs(y - x @ MATRIX.T) / size) < BOUNDS[format]


@pytest.mark.parametrize("format", [Int8(), Float8(), Int4(), Int4(None)], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_product_in_bfloat16(device: str, format: QuantizedFormat, rows: int):
    x = jnp.asarray(INPUTS[:rows], jnp.bfloat16)
    y = quantize_matrix(jnp.asarray(MATRIX), format).matmul(x)
    wanted = np.asarray(x, np.float32) @ stored(format).T
    # Integers are exact in bfloat16; scaled groups are not.
    np.testing.assert_allclose(y, wanted, atol=0.4 if format == Int4() else 1e-3)


@pytest.mark.parametrize("format", BOUNDS, ids=str)
def test_rows_alone_are_rows_together(format: QuantizedFormat):
    matrix, x = quantize_matrix(jnp.asarray(MATRIX), format), jnp.asarray(INPUTS)
    together = matrix.matmul(x[:8])
    alone = jnp.concatenate([matrix.matmul(x[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(alone, together, atol=1e-4)


def test_rows_of_zeros():
    assert not quantize_matrix(jnp.asarray(MATRIX), Int8Dynamic()).matmul(jnp.zeros((2, 256))).any()


def test_rows_can_be_taken_in_any_shape():
    found = quantize_matrix(jnp.asarray(MATRIX), Int4()).take(jnp.array([[3, 1], [1, 0]]))
    np.testing.assert_array_equal(found, stored(Int4())[[[3, 1], [1, 0]]])


def test_sizes():
    for format, bits in ((Int8(), 8), (Int4(), 4), (Int4(128), 4)):
        matrix = quantize_matrix(jnp.asarray(MATRIX), format)
        assert isinstance(matrix, QuantizedMatrix)
        assert matrix.values.nbytes * 8 == bits * MATRIX.size
    assert quantize_matrix(jnp.asarray(MATRIX), Int4()).scale.nbytes == 300 * 4 * 2


def test_groups_that_do_not_come_out_even_are_whole_rows():
    matrix = quantize_matrix(jnp.asarray(MATRIX[:, :200]), Int4())
    assert matrix.scale.shape == (300, 1) and matrix.scale.dtype == jnp.float32
    odd = quantize_matrix(jnp.asarray(MATRIX[:, :5]), Int4())
    x = INPUTS[:2, :5]
    np.testing.assert_allclose(odd.matmul(jnp.asarray(x)), x @ MATRIX[:, :5].T, atol=0.8)


def test_elsewhere_four_bits_are_a_type_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "backend", lambda: "gpu")
    assert quantize_matrix(jnp.asarray(MATRIX), Int4()).values.dtype == jnp.int4


def test_configs():
    assert QuantizationConfig.of("int8") == QuantizationConfig.of(Int8()) == QuantizationConfig()
    assert QuantizationConfig.of("int4") == QuantizationConfig(
        attention=Int4(64), mlp=Int4(64), embedding=Int8()
    )
    assert QuantizationConfig.of("int8-dynamic").embedding == Int8Dynamic()
    mixed = QuantizationConfig(mlp=Int4(128), embedding=None)
    assert QuantizationConfig.of(mixed) is mixed
    with pytest.raises(ConfigError, match="int8, .*mixed.*'int3'"):
        QuantizationConfig.of("int3")
    with pytest.raises(ConfigError, match="at least 2 inputs, got 1"):
        Int4(group=1)


def test_configs_of_parts():
    mixed = QuantizationConfig.of("mixed")
    assert mixed == QuantizationConfig(attention=Int8(), mlp=Int4(), embedding=Int8(), image=Int8())
    assert QuantizationConfig.of("float8") == QuantizationConfig(
        attention=Float8(), mlp=Float8(), embedding=Float8()
    )
    text = "attention=int4:row,mlp=int4:128,embedding=float8"
    found = QuantizationConfig.of(text)
    assert found == QuantizationConfig(
        attention=Int4(None), mlp=Int4(128), embedding=Float8(), image=None
    )
    assert str(found) == text
    for quantization in (found, mixed, QuantizationConfig.of("int8-dynamic")):
        assert QuantizationConfig.from_dict(quantization.to_dict()) == quantization
    with pytest.raises(ConfigError, match="weight 'head'; there is no format 'int3' .of mlp."):
        QuantizationConfig.of("mlp=int3,head=int8")
    with pytest.raises(ConfigError, match="twice"):
        QuantizationConfig.of("mlp=int8,mlp=int4")
    with pytest.raises(ValueError, match="embedding is missing"):
        QuantizationConfig.from_dict({"attention": "int8", "mlp": "int8", "image": None})


def test_large_weights_are_no_nans_in_8_bit_floats():
    matrix = quantize_matrix(jnp.asarray([[3e38, -3e38, 1.0], [0.0, 0.0, 0.0]]), Float8())
    found = np.asarray(matrix.take(jnp.arange(2)))
    np.testing.assert_allclose(found, [[3e38, -3e38, 0], [0, 0, 0]], rtol=1e-6)
