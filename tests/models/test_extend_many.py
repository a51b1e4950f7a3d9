"""Several tokens into the cache at once: the same as one after another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.config import GemmaConfig
from paligemma_jax.generation.decode import prefill
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma
from tests.goldens import assert_close
from tests.tiny import GEMMA, GEMMA2, SIGLIP, prompts, random_model, random_tokens, tiny_config

LENGTHS = [2, 5, 3]  # of the prompts
WIDTH = 6  # to which they are padded
STEPS = 5
START = SIGLIP.num_patches + WIDTH  # slots that the prompts take
SLOTS = START + 2 * STEPS

extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache))
extend_many = jax.jit(lambda model, *inputs: model.extend_many(*inputs))
MODELS = [(GEMMA, None), (GEMMA2, None), (GEMMA2, 3)]


def read_prompts(model: PaliGemma) -> KVCache:
    batch = prompts(LENGTHS, WIDTH)
    inputs = (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)
    return prefill(model, *map(jnp.asarray, inputs), slots=SLOTS)[1]


def positions_of(start: np.ndarray, tokens: int) -> jax.Array:
    """Of the next tokens of rows that have `start` tokens behind their prompts."""
    place = SIGLIP.num_patches + np.array(LENGTHS) + start
    return jnp.asarray(place[:, None] + np.arange(tokens), jnp.int32)


def in_order(cache: KVCache, tokens: int) -> jax.Array:
    """Each of the next tokens sees what is in the cache, itself, and those before it."""
    first = np.broadcast_to(np.asarray(cache.length), (len(LENGTHS),))
    slots = np.arange(SLOTS)
    ends = first[:, None] + np.arange(tokens)
    new = (slots >= first[:, None, None]) & (slots <= ends[:, :, None])
    return jnp.asarray(np.asarray(cache.valid)[:, None] | new)


def one_by_one(model: PaliGemma, tokens: np.ndarray) -> tuple[np.ndarray, KVCache]:
    cache, logits = read_prompts(model), []
    for column in tokens.T:
        row, cache = extend(model, jnp.asarray(column), cache)
        logits.append(row)
    return np.stack(logits, axis=1), cache


@pytest.mark.parametrize("llm, window", MODELS, ids=["gemma", "gemma2", "gemma2-window"])
def test_equals_one_after_another(llm: GemmaConfig, window: int | None):
    """In a ragged batch; then the cache is the same, and goes on the same."""
    model = random_model(tiny_config(llm, sliding_window=window))
    tokens = random_tokens(len(LENGTHS), STEPS)
    expected, slow = one_by_one(model, tokens)
    cache = read_prompts(model)
    places = positions_of(np.zeros(len(LENGTHS), int), STEPS)
    logits, fast = extend_many(model, jnp.asarray(tokens), places, in_order(cache, STEPS), cache)
    assert_close(logits, expected)
    for one, many in zip(jax.tree.leaves(slow), jax.tree.leaves(fast), strict=True):
        assert_close(many, one)
    after = jnp.asarray(tokens[:, 0])
    assert_close(extend(model, after, fast)[0], extend(model, after, slow)[0])


@pytest.mark.parametrize("llm, window", MODELS, ids=["gemma", "gemma2", "gemma2-window"])
def test_rows_at_different_paces(llm: GemmaConfig, window: int | None):
    """Rows keep 1, 3 and 0 of the first three tokens, and write over the rest."""
    model = random_model(tiny_config(llm, sliding_window=window))
    tokens = random_tokens(len(LENGTHS), STEPS)
    expected, _ = one_by_one(model, tokens)
    kept = np.array([1, 3, 0])
    cache = read_prompts(model)
    cache = dataclasses.replace(cache, length=jnp.full(len(LENGTHS), START, jnp.int32))
    guess = tokens[:, :3].copy()
    guess[np.arange(3) >= kept[:, None]] = 7
    places = positions_of(np.zeros(len(LENGTHS), int), 3)
    _, cache = extend_many(model, jnp.asarray(guess), places, in_order(cache, 3), cache)
    length = jnp.asarray(START + kept, jnp.int32)
    slots = np.arange(SLOTS)
    valid = np.asarray(cache.valid) & (slots < np.asarray(length)[:, None])
    cache = dataclasses.replace(cache, length=length, valid=jnp.asarray(valid))
    rest = np.stack([row[n : n + 2] for row, n in zip(tokens, kept, strict=True)])
    logits, cache = extend_many(
        model, jnp.asarray(rest), positions_of(kept, 2), in_order(cache, 2), cache
    )
    wanted = np.stack([row[n : n + 2] for row, n in zip(expected, kept, strict=True)])
    assert_close(logits, wanted)
    np.testing.assert_array_equal(cache.length, START + kept + 2)


def test_tokens_see_only_what_they_may(tiny_model: PaliGemma):
    """Side by side, each seeing itself alone, they are what each would be as the next token."""
    tokens = random_tokens(len(LENGTHS), 4)
    cache = read_prompts(tiny_model)
    places = jnp.repeat(positions_of(np.zeros(len(LENGTHS), int), 1), 4, axis=1)
    own = np.arange(SLOTS) == START + np.arange(4)[:, None]
    visible = jnp.asarray(np.asarray(cache.valid)[:, None] | own)
    logits, _ = extend_many(tiny_model, jnp.asarray(tokens), places, visible, cache)
    for i, column in enumerate(tokens.T):
        assert_close(logits[:, i], extend(tiny_model, jnp.asarray(column), cache)[0])
