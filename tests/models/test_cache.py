"""The key-value cache, stored in one stack or layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models.kv_cache import (
    KVCache,
    LayerKeyValues,
    StackedKeyValues,
    empty_cache,
    empty_layers,
    empty_stacked,
)

SHAPE = dict(depth=2, batch=1, kv_heads=1, slots=6, head_dim=2)


@pytest.fixture(params=[empty_stacked, empty_layers])
def cache(request: pytest.FixtureRequest) -> KVCache:
    return empty_cache(request.param(**SHAPE, dtype=jnp.bfloat16), 1, 6)


def test_kinds_have_their_shapes():
    stacked = empty_stacked(**SHAPE, dtype=jnp.bfloat16)
    assert isinstance(stacked, StackedKeyValues) and stacked.k.shape == (2, 1, 1, 6, 2)
    layers = empty_layers(**SHAPE, dtype=jnp.float32)
    assert isinstance(layers, LayerKeyValues) and [x.shape for x in layers.v] == [(1, 1, 6, 2)] * 2


def test_keeps_what_is_written_where_it_is_written(cache: KVCache):
    prompt, token = jnp.ones((1, 1, 3, 2)), jnp.full((1, 1, 1, 2), 5.0)
    cache = cache.claim(jnp.array([[True, True, False]]), jnp.array([[0, 1, 1]]))
    cache = cache.write(1, prompt, 2 * prompt).advance(3)
    one = jnp.ones((1, 1), bool)
    cache = cache.claim(one, jnp.array([[2]])).write(1, token, 2 * token).advance(1)
    k, v = cache.read(1)
    assert k.dtype == v.dtype == jnp.bfloat16
    np.testing.assert_array_equal(k[0, 0, :, 0], [1, 1, 1, 5, 0, 0])
    np.testing.assert_array_equal(v, 2 * k)
    assert not np.asarray(cache.read(0)).any()
    np.testing.assert_array_equal(cache.valid, [[True, True, False, True, False, False]])
    np.testing.assert_array_equal(cache.positions, [[0, 1, 1, 2, 0, 0]])
    assert int(cache.length) == 4
    assert cache.nbytes == 2 * 2 * 6 * 2 * 2


@pytest.mark.parametrize("empty", [empty_stacked, empty_layers])
def test_rows_may_have_a_length_each(empty):
    shape = SHAPE | {"batch": 2}
    cache = empty_cache(empty(**shape, dtype=jnp.float32), 2, 6)
    cache = KVCache(cache.layers, cache.valid, cache.positions, jnp.array([1, 3]))
    new = jnp.arange(1.0, 9.0).reshape(2, 1, 2, 2)
    cache = cache.claim(jnp.ones((2, 2), bool), jnp.array([[1, 2], [3, 4]])).write(0, new, -new)
    k, v = cache.read(0)
    np.testing.assert_array_equal(k[0, 0, :, 0], [0, 1, 3, 0, 0, 0])
    np.testing.assert_array_equal(k[1, 0, :, 0], [0, 0, 0, 5, 7, 0])
    np.testing.assert_array_equal(v, -k)
    np.testing.assert_array_equal(cache.valid.sum(axis=1), [2, 2])


@pytest.mark.parametrize("empty", [empty_stacked, empty_layers])
def test_rows_repeated_stand_side_by_side(empty):
    cache = empty_cache(empty(**(SHAPE | {"batch": 2}), dtype=jnp.float32), 2, 6)
    new = jax.random.normal(jax.random.key(0), (2, 1, 6, 2))
    cache = cache.claim(jnp.eye(2, 6, dtype=bool), jnp.ones((2, 6), jnp.int32)).write(0, new, -new)
    many = cache.repeat(3)
    for copy in range(6):
        row = copy // 3
        for layer in (0, 1):
            for old, wide in zip(cache.read(layer), many.read(layer), strict=True):
                np.testing.assert_array_equal(wide[copy], old[row])
        np.testing.assert_array_equal(many.valid[copy], cache.valid[row])
        np.testing.assert_array_equal(many.positions[copy], cache.positions[row])
