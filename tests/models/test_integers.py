"""Rounding to integers of few bits, and how they lie in memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models import layers as backend
from paligemma_jax.models import quantized_matrix as integers
from paligemma_jax.models.quantized_matrix import (
    Layout,
    Pairs,
    Plain,
    as_in_files,
    as_on_device,
    fit_rows,
    layout_of_4_bits,
    multiply_groups,
    round_rows,
)

MATRIX = np.random.default_rng(0).normal(size=(6, 24)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16])
def test_within_half_a_step(bits: int, groups: int, scale_dtype: type):
    values, scale = round_rows(jnp.asarray(MATRIX), bits, groups, scale_dtype)
    assert values.dtype == jnp.int8 and int(jnp.abs(values).max()) == 2 ** (bits - 1) - 1
    assert scale.shape == (6, groups) and scale.dtype == scale_dtype
    steps = scale.astype(jnp.float32)
    error = jnp.abs(multiply_groups(values.astype(jnp.float32), steps) - MATRIX)
    # A scale that bfloat16 has rounded down leaves the largest number out of reach.
    room = 0.5 if scale_dtype == jnp.float32 else 0.5 + 2**-8 * 2 ** (bits - 1)
    assert np.all(error.reshape(6, groups, -1) <= room * steps[:, :, None] * (1 + 1e-6))


def _squared_error(values: jax.Array, scale: jax.Array) -> float:
    found = multiply_groups(values.astype(jnp.float32), scale.astype(jnp.float32))
    return float(jnp.sum(jnp.square(found - MATRIX)))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16])
def test_fitted_scales_leave_less_error(groups: int, scale_dtype: type):
    values, scale = fit_rows(jnp.asarray(MATRIX), 4, groups, scale_dtype)
    assert values.dtype == jnp.int8 and int(values.min()) == -8 and int(values.max()) <= 7
    assert scale.shape == (6, groups) and scale.dtype == scale_dtype
    plain = round_rows(jnp.asarray(MATRIX), 4, groups, scale_dtype)
    assert _squared_error(values, scale) < 0.95 * _squared_error(*plain)


def test_fitted_scales_are_the_best_of_those_tried():
    values, scale = fit_rows(jnp.asarray(MATRIX), 4, 3)
    least = np.full((6, 3), np.inf)
    grouped = MATRIX.reshape(6, 3, 8)
    largest = np.take_along_axis(grouped, np.abs(grouped).argmax(2)[:, :, None], 2)
    for share in integers._SHARES:
        step = largest / -8 * share
        off = np.clip(np.round(grouped / step), -8, 7) * step - grouped
        least = np.minimum(least, np.square(off).sum(2))
    assert _squared_error(values, scale) == pytest.approx(least.sum(), rel=1e-5)


def test_weights_in_even_steps_are_kept_exactly():
    steps = np.random.default_rng(0).integers(-8, 8, (6, 24)).astype(np.float32)
    steps[:, ::8] = -8
    values, scale = fit_rows(jnp.asarray(steps) / 4, 4, 3, jnp.bfloat16)
    np.testing.assert_array_equal(values, steps)
    np.testing.assert_array_equal(scale, np.full((6, 3), 0.25))


@pytest.mark.parametrize("rounding", [round_rows, fit_rows])
def test_zeros_stay_zeros(rounding: Callable[..., tuple[jax.Array, jax.Array]]):
    values, scale = rounding(jnp.zeros((2, 4)), 4)
    assert not values.any() and np.array_equal(scale, np.ones((2, 1)))


@pytest.mark.parametrize("layout", [Plain(jnp.int8), Pairs(1), Pairs(3)])
def test_layouts(layout: Layout):
    steps = np.random.default_rng(0).integers(-8, 8, (6, 24)).astype(np.int8)
    stored = layout.write(jnp.asarray(steps))
    np.testing.assert_array_equal(layout.read(stored), steps)
    parts = zip(layout.parts(stored), layout.parts_of_rows(jnp.asarray(MATRIX[:2])), strict=True)
    product = sum(np.asarray(x) @ np.asarray(w).astype(np.float32).T for w, x in parts)
    np.testing.assert_allclose(product, MATRIX[:2] @ steps.T, rtol=1e-4, atol=1e-4)


def test_pairs_take_half_a_byte():
    assert Pairs(1).write(jnp.ones((6, 24), jnp.int8)).nbytes == 6 * 24 // 2


@pytest.mark.parametrize("columns", [24, 21])
def test_files_are_the_same_from_every_device(columns: int, monkeypatch: pytest.MonkeyPatch):
    numbers = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (5, columns)), jnp.int8)
    layout = layout_of_4_bits(columns, 3)
    here = layout.write(numbers)
    assert here.shape[1] == (12 if columns == 24 else 21)  # odd groups take a byte for each
    np.testing.assert_array_equal(as_in_files(here, 3), here)
    np.testing.assert_array_equal(as_on_device(here, columns, 3), here)
    monkeypatch.setattr(backend, "name", lambda: "gpu")
    there = layout_of_4_bits(columns, 3).write(numbers)
    assert there.dtype == jnp.int4 and there.shape == (5, columns)
    np.testing.assert_array_equal(as_in_files(there, 3), here)
    found = as_on_device(here, columns, 3)
    assert found.dtype == jnp.int4
    np.testing.assert_array_equal(found, there)
