"""Quantized matrices: matmuls close to those of the matrix, exact for what is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.models import layers, quantized_matrix
from paligemma_jax.models.quantization_config import (
    Float8,
    Int4,
    Int8,
    Int8Dynamic,
    QuantizationConfig,
    QuantizedFormat,
)
from paligemma_jax.models.quantized_matrix import (
    QuantizedMatrix,
    as_in_files,
    int4_from_files,
    int4_on_device,
    multiply_groups,
    pack_int4,
    quantize_int4,
    quantize_int8,
    quantize_matrix,
    unpack_int4,
)

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
    monkeypatch.setattr(layers, "BLOCK", 64 * 256)


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of programs can run here."""
    monkeypatch.setattr(layers, "backend", lambda: request.param)
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
    monkeypatch.setattr(layers, "backend", lambda: "gpu")
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


SMALL = np.random.default_rng(0).normal(size=(6, 24)).astype(np.float32)


def test_int8_is_within_half_a_step():
    values, scale = quantize_int8(jnp.asarray(SMALL))
    assert values.dtype == jnp.int8 and int(jnp.abs(values).max()) == 127
    error = np.abs(np.asarray(values) * np.asarray(scale) - SMALL)
    assert scale.shape == (6, 1) and np.all(error <= 0.5 * np.asarray(scale) * (1 + 1e-6))


def _squared_error(values: jax.Array, scale: jax.Array) -> float:
    found = multiply_groups(values.astype(jnp.float32), scale.astype(jnp.float32))
    return float(jnp.sum(jnp.square(found - SMALL)))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16])
def test_fitted_scales_leave_less_error(groups: int, scale_dtype: type):
    values, scale = quantize_int4(jnp.asarray(SMALL), groups, scale_dtype)
    assert values.dtype == jnp.int8 and int(values.min()) == -8 and int(values.max()) <= 7
    assert scale.shape == (6, groups) and scale.dtype == scale_dtype
    grouped = SMALL.reshape(6, groups, -1)
    largest = np.abs(grouped).max(2, keepdims=True) / 7
    plain = np.round(grouped / largest) * largest
    assert _squared_error(values, scale) < 0.95 * np.square(plain - grouped).sum()


def test_fitted_scales_are_the_best_of_those_tried():
    values, scale = quantize_int4(jnp.asarray(SMALL), 3)
    least = np.full((6, 3), np.inf)
    grouped = SMALL.reshape(6, 3, 8)
    largest = np.take_along_axis(grouped, np.abs(grouped).argmax(2)[:, :, None], 2)
    for share in quantized_matrix._SCALES:
        step = largest / -8 * share
        off = np.clip(np.round(grouped / step), -8, 7) * step - grouped
        least = np.minimum(least, np.square(off).sum(2))
    assert _squared_error(values, scale) == pytest.approx(least.sum(), rel=1e-5)


def test_weights_in_even_steps_are_kept_exactly():
    steps = np.random.default_rng(0).integers(-8, 8, (6, 24)).astype(np.float32)
    steps[:, ::8] = -8
    values, scale = quantize_int4(jnp.asarray(steps) / 4, 3, jnp.bfloat16)
    np.testing.assert_array_equal(values, steps)
    np.testing.assert_array_equal(scale, np.full((6, 3), 0.25))


def test_zeros_stay_zeros():
    for values, scale in (quantize_int8(jnp.zeros((2, 4))), quantize_int4(jnp.zeros((2, 4)))):
        assert not values.any() and np.array_equal(scale, np.ones((2, 1)))


@pytest.mark.parametrize("groups", [1, 3])
def test_two_integers_in_a_byte(groups: int):
    steps = np.random.default_rng(0).integers(-8, 8, (6, 24)).astype(np.int8)
    stored = pack_int4(jnp.asarray(steps), groups)
    assert stored.nbytes == 6 * 24 // 2
    np.testing.assert_array_equal(unpack_int4(stored, 24, groups), steps)


@pytest.mark.parametrize("columns", [24, 21])
def test_files_are_the_same_from_every_device(columns: int, monkeypatch: pytest.MonkeyPatch):
    numbers = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (5, columns)), jnp.int8)
    here = int4_on_device(numbers, 3)
    assert here.shape[1] == (12 if columns == 24 else 21)  # odd groups take a byte for each
    np.testing.assert_array_equal(as_in_files(here, 3), here)
    np.testing.assert_array_equal(int4_from_files(here, columns, 3), here)
    monkeypatch.setattr(layers, "backend", lambda: "gpu")
    there = int4_on_device(numbers, 3)
    assert there.dtype == jnp.int4 and there.shape == (5, columns)
    np.testing.assert_array_equal(as_in_files(there, 3), here)
    found = int4_from_files(here, columns, 3)
    assert found.dtype == jnp.int4
    np.testing.assert_array_equal(found, there)
