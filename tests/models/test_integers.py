"""Rounding to integers of few bits, and how they lie in memory."""

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models.integers import Layout, Pairs, Plain, multiply_groups, round_rows

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


def test_zeros_stay_zeros():
    values, scale = round_rows(jnp.zeros((2, 4)), 8)
    assert not values.any() and np.array_equal(scale, np.ones((2, 1)))


@pytest.mark.parametrize("layout", [Plain(jnp.int8), Pairs(1), Pairs(3)])
def test_layouts(layout: Layout):
    integers = np.random.default_rng(0).integers(-8, 8, (6, 24)).astype(np.int8)
    stored = layout.write(jnp.asarray(integers))
    np.testing.assert_array_equal(layout.read(stored), integers)
    parts = zip(layout.parts(stored), layout.parts_of_rows(jnp.asarray(MATRIX[:2])), strict=True)
    product = sum(np.asarray(x) @ np.asarray(w).astype(np.float32).T for w, x in parts)
    np.testing.assert_allclose(product, MATRIX[:2] @ integers.T, rtol=1e-4, atol=1e-4)


def test_pairs_take_half_a_byte():
    assert Pairs(1).write(jnp.ones((6, 24), jnp.int8)).nbytes == 6 * 24 // 2
