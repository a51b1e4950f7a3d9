"""The cache: what is written is read back, stacked or layer by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models.kv_cache import KVCache

SHAPE = dict(depth=2, batch=1, kv_heads=1, slots=6, head_dim=2)


def empty(stacked: bool, batch: int = 1) -> KVCache:
    return KVCache.empty(**(SHAPE | {"batch": batch}), dtype=jnp.bfloat16, stacked=stacked)


@pytest.fixture(params=[True, False], ids=["stacked", "layers"])
def stacked(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_shapes():
    assert [x.shape for x in jax.tree.leaves(empty(True).k)] == [(2, 1, 1, 6, 2)]
    assert [x.shape for x in empty(False).v] == [(1, 1, 6, 2)] * 2


def test_keeps_what_is_written_where_it_is_written(stacked: bool):
    cache = empty(stacked)
    prompt, token = jnp.ones((1, 1, 3, 2)), jnp.full((1, 1, 1, 2), 5.0)
    cache = cache.reserve(jnp.array([[True, True, False]]), jnp.array([[0, 1, 1]]))
    cache = cache.write(1, prompt, 2 * prompt).advance(3)
    one = jnp.ones((1, 1), bool)
    cache = cache.reserve(one, jnp.array([[2]])).write(1, token, 2 * token).advance(1)
    k, v = cache.read(1)
    assert k.dtype == v.dtype == jnp.bfloat16
    np.testing.assert_array_equal(k[0, 0, :, 0], [1, 1, 1, 5, 0, 0])
    np.testing.assert_array_equal(v, 2 * k)
    assert not np.asarray(cache.read(0)).any()
    np.testing.assert_array_equal(cache.valid, [[True, True, False, True, False, False]])
    np.testing.assert_array_equal(cache.positions, [[0, 1, 1, 2, 0, 0]])
    assert int(cache.length) == 4
    assert cache.nbytes == 2 * 2 * 6 * 2 * 2


def test_sequences_may_have_a_length_each(stacked: bool):
    cache = dataclasses.replace(empty(stacked, 2), length=jnp.array([1, 3]))
    new = jnp.arange(1.0, 9.0).reshape(2, 1, 2, 2)
    cache = cache.reserve(jnp.ones((2, 2), bool), jnp.array([[1, 2], [3, 4]])).write(0, new, -new)
    k, v = cache.read(0)
    np.testing.assert_array_equal(k[0, 0, :, 0], [0, 1, 3, 0, 0, 0])
    np.testing.assert_array_equal(k[1, 0, :, 0], [0, 0, 0, 5, 7, 0])
    np.testing.assert_array_equal(v, -k)
    np.testing.assert_array_equal(cache.valid.sum(axis=1), [2, 2])


def test_repeated_sequences_stand_side_by_side(stacked: bool):
    cache = empty(stacked, 2)
    new = jax.random.normal(jax.random.key(0), (2, 1, 6, 2))
    cache = cache.reserve(jnp.eye(2, 6, dtype=bool), jnp.ones((2, 6), jnp.int32)).write(
        0, new, -new
    )
    many = cache.repeat(3)
    for copy in range(6):
        row = copy // 3
        for layer in (0, 1):
            for old, wide in zip(cache.read(layer), many.read(layer), strict=True):
                np.testing.assert_array_equal(wide[copy], old[row])
        np.testing.assert_array_equal(many.valid[copy], cache.valid[row])
        np.testing.assert_array_equal(many.positions[copy], cache.positions[row])
