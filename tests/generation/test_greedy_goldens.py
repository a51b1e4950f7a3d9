"""Greedy answers are big_vision's and transformers', token by token, with their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.decode import decode, prefill
from paligemma_jax.generation.sampling import Greedy
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma
from tests.goldens import (
    BIG_VISION,
    EOS,
    HUGGING_FACE,
    assert_close,
    big_vision,
    hugging_face,
    hugging_face_images,
    hugging_face_rows,
    optimized,
    prompt,
    until_eos,
)

STEPS = 8


def read(model: PaliGemma, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, KVCache]:
    """Prefill with room for 8 steps."""
    images, tokens = inputs[:2]
    slots = images.shape[1] * model.config.img.num_patches + tokens.shape[1] + STEPS
    return prefill(model, *inputs, slots)


def greedy(model: PaliGemma, logits: jax.Array, cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities of 8 steps."""
    rows = logits.shape[0]
    row_mask, seeds = jnp.ones(rows, bool), jnp.zeros(rows, jnp.uint32)
    limit = jnp.asarray(STEPS, jnp.int32)
    tokens, logprobs, _, _ = decode(
        model, cache, logits, row_mask, seeds, limit, Greedy(), STEPS, EOS
    )
    return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.parametrize("name", BIG_VISION)
def test_big_vision(name: str):
    """big_vision leaves the first token's logits uncapped, here a second model imitates that."""
    golden = big_vision(name)
    model = golden.model(final_logit_softcap=0.0)
    capped = golden.model(final_logit_softcap=30.0 if name == "pg2_softcap" else 0.0)
    with optimized():
        state = read(model, prompt(golden))
    tokens, logprobs = greedy(capped, *state)
    kept = until_eos(golden["greedy_tokens"])
    np.testing.assert_array_equal(tokens, np.where(kept, golden["greedy_tokens"], 0))
    assert_close(logprobs, np.where(kept, golden["greedy_logp"], 0), golden.atol)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name: str):
    """A left-padded batch, whose first row is the prompt that was also answered alone."""
    golden = hugging_face(name)
    model = golden.model(sliding_window=6 if name == "pg2_sw" else None)
    images = jnp.asarray(hugging_face_images(golden)[:, None])
    rows = hugging_face_rows(golden, golden["batch_ids"], golden["batch_mask"])
    tokens, _ = greedy(model, *read(model, (images, *map(jnp.asarray, rows))))
    expected = golden["batch_greedy_real"]
    np.testing.assert_array_equal(tokens, np.where(until_eos(expected), expected, 0))
    np.testing.assert_array_equal(tokens[0], golden["greedy_real"][0])


def test_hugging_face_without_the_window():
    """pg2_sw has pg2's weights: without its window it answers as pg2 does."""
    sliding, plain = hugging_face("pg2_sw"), hugging_face("pg2")
    images = jnp.asarray(hugging_face_images(sliding)[:, None])
    rows = hugging_face_rows(sliding, sliding["batch_ids"], sliding["batch_mask"])
    model = sliding.model()
    tokens, _ = greedy(model, *read(model, (images, *map(jnp.asarray, rows))))
    np.testing.assert_array_equal(tokens, plain["batch_greedy_real"])
    assert (tokens != sliding["batch_greedy_real"]).any()
