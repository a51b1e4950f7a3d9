"""Quantization to 8 and 4 bits, and how 4-bit weights are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models import layers, quantized_matrix
from paligemma_jax.models.quantized_matrix import (
    as_in_files,
    int4_from_files,
    int4_on_device,
    multiply_groups,
    pack_int4,
    quantize_int4,
    quantize_int8,
    unpack_int4,
)

MATRIX = np.random.default_rng(0).normal(size=(6, 24)).astype(np.float32)


def test_int8_is_within_half_a_step():
    values, scale = quantize_int8(jnp.asarray(MATRIX))
    assert values.dtype == jnp.int8 and int(jnp.abs(values).max()) == 127
    error = np.abs(np.asarray(values) * np.asarray(scale) - MATRIX)
    assert scale.shape == (6, 1) and np.all(error <= 0.5 * np.asarray(scale) * (1 + 1e-6))


def _squared_error(values: jax.Array, scale: jax.Array) -> float:
    found = multiply_groups(values.astype(jnp.float32), scale.astype(jnp.float32))
    return float(jnp.sum(jnp.square(found - MATRIX)))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16])
def test_fitted_scales_leave_less_error(groups: int, scale_dtype: type):
    values, scale = quantize_int4(jnp.asarray(MATRIX), groups, scale_dtype)
    assert values.dtype == jnp.int8 and int(values.min()) == -8 and int(values.max()) <= 7
    assert scale.shape == (6, groups) and scale.dtype == scale_dtype
    grouped = MATRIX.reshape(6, groups, -1)
    largest = np.abs(grouped).max(2, keepdims=True) / 7
    plain = np.round(grouped / largest) * largest
    assert _squared_error(values, scale) < 0.95 * np.square(plain - grouped).sum()


def test_fitted_scales_are_the_best_of_those_tried():
    values, scale = quantize_int4(jnp.asarray(MATRIX), 3)
    least = np.full((6, 3), np.inf)
    grouped = MATRIX.reshape(6, 3, 8)
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
