"""Masks, rotary embedding, grouped attention, the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models.attention import (
    empty_cache,
    grouped_query_attention,
    prefix_lm_mask,
    rotary_embedding,
    sliding_window_mask,
    soft_cap,
)


def picture(mask: jax.Array) -> list[str]:
    """A mask as rows of # (sees) and . (does not)."""
    return ["".join("#" if seen else "." for seen in row) for row in np.asarray(mask)]


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape, bool)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_prefix_sees_itself_and_answer_is_causal():
    mask = prefix_lm_mask(jnp.array([[0, 0, 0, 1, 1]]), ones(1, 5))
    assert picture(mask[0]) == ["###..", "###..", "###..", "####.", "#####"]


def test_every_run_of_zeros_is_a_block():
    mask = prefix_lm_mask(jnp.array([[0, 0, 1, 0, 1]]), ones(1, 5))
    assert picture(mask[0]) == ["##...", "##...", "####.", "####.", "#####"]


def test_padding_is_seen_by_none_and_sees_nothing():
    mask = prefix_lm_mask(jnp.array([[0, 0, 1, 1]]), jnp.array([[True, True, True, False]]))
    assert picture(mask[0]) == ["##..", "##..", "###.", "...."]


def test_window_spares_the_prefix():
    """Hugging Face's rule, as its model shows it: window 5, 7 prefix and 4 answer tokens."""
    mask_ar = jnp.array([[0] * 7 + [1] * 4])
    block = jnp.cumsum(mask_ar, axis=1)
    places = jnp.arange(11)[None]
    full = prefix_lm_mask(mask_ar, ones(1, 11))
    mask = sliding_window_mask(
        full, places, places, block[:, :, None] == block[:, None, :], window=5
    )
    assert picture(mask[0]) == ["#######...."] * 7 + [
        "...#####...",
        "....#####..",
        ".....#####.",
        "......#####",
    ]


def test_window_of_cached_keys_counts_the_row_own_places():
    """Two rows whose key 3 is padding, at place 4 and the newest slot."""
    places = jnp.array([[0, 1, 2, 0, 3, 4]])
    valid = jnp.array([[[True, True, True, False, True, True]]])
    mask = sliding_window_mask(valid, jnp.array([[4]]), places, jnp.zeros_like(valid), window=3)
    assert picture(mask[0]) == ["..#.##"]


def test_rotary_embedding_by_its_definition():
    x, position = np.asarray(normal(8)), 7
    rotated = rotary_embedding(jnp.asarray(x)[None, None, None], jnp.array([[position]]))
    for i in range(4):  # pairs are (i, i + H/2)
        angle = position / 10_000 ** (2 * i / 8)
        wanted = (x[i] + 1j * x[i + 4]) * np.exp(1j * angle)
        got = rotated[0, 0, 0, i] + 1j * rotated[0, 0, 0, i + 4]
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_rotary_embedding_is_relative():
    q, k = normal(1, 1, 2, 16), normal(1, 1, 2, 16, seed=1)

    def score(i: int, j: int) -> np.ndarray:
        rotated_q = rotary_embedding(q, jnp.array([[i]]))
        rotated_k = rotary_embedding(k, jnp.array([[j]]))
        return np.asarray(jnp.sum(rotated_q * rotated_k, axis=-1))

    for offset in (1, 100, 4000):
        np.testing.assert_allclose(score(9 + offset, 2 + offset), score(9, 2), atol=5e-3)
    assert np.abs(score(9, 2) - score(9, 3)).max() > 1e-2
    np.testing.assert_array_equal(rotary_embedding(q, jnp.array([[0]])), q)


def test_rotary_angles_are_float32_in_bfloat16():
    """bfloat16 angles would be off by whole turns at place 4001."""
    x = normal(1, 1, 1, 16)
    exact = rotary_embedding(x, jnp.array([[4001]]))
    rounded = rotary_embedding(x.astype(jnp.bfloat16), jnp.array([[4001]]))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_attention_repeats_the_key_heads(kv_heads: int):
    """Query head n looks at key head n // (N / K)."""
    q = normal(2, 3, 4, 8)
    k, v = normal(2, kv_heads, 5, 8, seed=1), normal(2, kv_heads, 5, 8, seed=2)
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (2, 3, 5)).at[:, :, 0].set(True)
    out = grouped_query_attention(q, k, v, mask, cap=2.0)
    for head in range(4):
        group = head // (4 // kv_heads)
        logits = soft_cap(jnp.einsum("bth,bsh->bts", q[:, :, head], k[:, group]), 2.0)
        weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
        wanted = jnp.einsum("bts,bsh->bth", weights, v[:, group])
        np.testing.assert_allclose(out[:, :, head], wanted, atol=1e-5)


def test_a_row_that_sees_nothing_stays_finite():
    q, k = normal(1, 1, 1, 4), normal(1, 1, 3, 4)
    out = grouped_query_attention(q, k, k, jnp.zeros((1, 1, 3), bool), cap=0.0)
    assert np.isfinite(out).all()


def test_soft_cap():
    x = jnp.array([-1000.0, 0.0, 1.0, 1000.0])
    np.testing.assert_array_equal(soft_cap(x, 0.0), x)
    np.testing.assert_allclose(soft_cap(x, 30.0), 30 * np.tanh(np.asarray(x) / 30), rtol=1e-6)


def test_cache_keeps_what_is_written_where_it_is_written():
    cache = empty_cache(depth=2, batch=1, kv_heads=1, slots=6, head_dim=2, dtype=jnp.bfloat16)
    assert cache.k.shape == (2, 1, 1, 6, 2) and cache.k.dtype == jnp.bfloat16
    layer = jnp.asarray(1)
    prompt, token = jnp.ones((1, 1, 3, 2)), jnp.full((1, 1, 1, 2), 5.0)
    cache = cache.claim(jnp.array([[True, True, False]]), jnp.array([[0, 1, 1]]))
    cache = cache.write(layer, prompt, 2 * prompt).advance(3)
    cache = cache.claim(ones(1, 1), jnp.array([[2]])).write(layer, token, 2 * token).advance(1)
    k, v = cache.read(layer)
    np.testing.assert_array_equal(k[0, 0, :, 0], [1, 1, 1, 5, 0, 0])
    np.testing.assert_array_equal(v, 2 * k)
    assert not np.asarray(cache.read(jnp.asarray(0))).any()
    np.testing.assert_array_equal(cache.valid, [[True, True, False, True, False, False]])
    np.testing.assert_array_equal(cache.positions, [[0, 1, 1, 2, 0, 0]])
    assert int(cache.length) == 4
