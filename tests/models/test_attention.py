"""Rotary embedding, grouped attention, the masks of prefix-LM and of windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paligemma_jax.models.attention as attention_module
from paligemma_jax.models.attention import (
    attention,
    grouped_query_attention,
    rotary_embedding,
    soft_cap,
)
from paligemma_jax.models.masks import PrefixMask, prefix_lm_mask, sliding_window_mask


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


def test_long_sequences_go_through_in_blocks(monkeypatch: pytest.MonkeyPatch):
    """13 queries, at once and four at a time (the last block overlaps); padding and a window."""
    q, k, v = normal(2, 13, 4, 8), normal(2, 2, 13, 8, seed=1), normal(2, 2, 13, 8, seed=2)
    mask_ar = jnp.array([[0] * 6 + [1] * 7, [0] * 3 + [1] * 10])
    valid = jnp.arange(13) < jnp.array([[13], [9]])
    for window in (None, 3):
        mask = PrefixMask.of(mask_ar, valid, window)
        for layer in (0, 1, jnp.asarray(0), jnp.asarray(1)):
            whole = attention(q, k, v, mask, layer, 5.0)
            monkeypatch.setattr(attention_module, "SCORES", 4 * 2 * 4 * 13 * 5)
            monkeypatch.setattr(attention_module, "FEWEST_QUERIES", 2)
            blocks = attention(q, k, v, mask, layer, 5.0)
            monkeypatch.undo()
            np.testing.assert_allclose(blocks, whole, atol=1e-6)


def test_blocks_hold_no_matrix_of_all_pairs():
    length = 8192

    def run(q: jax.Array, valid: jax.Array) -> jax.Array:
        mask = PrefixMask.of(jnp.zeros((1, length), jnp.int32), valid)
        return attention(q, q.swapaxes(1, 2), q.swapaxes(1, 2), mask, 0, 0.0)

    q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    valid = jax.ShapeDtypeStruct((1, length), jnp.bool)
    compiled = jax.jit(run).lower(q, valid).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 2 * length * length * 4 / 2  # two heads, float32


def test_windows_narrow_even_layers_only():
    mask_ar = jnp.array([[0, 0, 1, 1, 1]])
    mask = PrefixMask.of(mask_ar, ones(1, 5), window=2)
    assert picture(mask.visible(0)[0]) == ["##...", "##...", ".##..", "..##.", "...##"]
    assert picture(mask.visible(1)[0]) == ["##...", "##...", "###..", "####.", "#####"]
    for layer in (0, 1, 2):
        np.testing.assert_array_equal(mask.visible(jnp.asarray(layer)), mask.visible(layer))
