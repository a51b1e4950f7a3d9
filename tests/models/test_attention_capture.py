"""The attention that `watch` shows is the attention that the model computes with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.config import GemmaConfig
from paligemma_jax.models.masks import Layer
from paligemma_jax.models.paligemma import PaliGemma
from tests.goldens import BIG_VISION, big_vision, hugging_face, hugging_face_images
from tests.tiny import GEMMA, GEMMA2, prompts, random_model, tiny_config


def collect(seen: tuple[jax.Array, ...], weights: jax.Array, layer: Layer) -> tuple[jax.Array, ...]:
    """Stores the layer's weights in an array with a place for each layer."""
    return (seen[0].at[layer].set(weights),)


@jax.jit
def watch(
    model: PaliGemma, images: jax.Array, *text: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states, weights f32[L, B, N, S, S] and masks bool[L, B, S, S] of one pass."""
    encoded = model.encode_images(images)
    rows, length = images.shape[0], encoded.shape[1] + text[0].shape[1]
    c = model.config.llm
    start = (jnp.zeros((c.depth, rows, c.num_heads, length, length)),)
    tokens, mask_ar, mask_input = text
    hidden, (weights,) = model.hidden_with_attention(
        encoded, tokens, mask_ar, mask_input, collect, start
    )
    before = ((0, 0), (encoded.shape[1], 0))
    masks = model.attention_masks(
        jnp.pad(text[1], before), jnp.pad(text[2], before, constant_values=True)
    )
    return hidden, weights, masks[jnp.arange(c.depth) % masks.shape[0]]


@jax.jit
def hidden(model: PaliGemma, images: jax.Array, tokens: jax.Array, mask_ar: jax.Array) -> jax.Array:
    return model.hidden(model.encode_images(images), tokens, mask_ar)


def check(model: PaliGemma, *inputs: jax.Array) -> np.ndarray:
    """Asserts what holds of every pass without padding; returns the weights."""
    seen, weights, masks = map(np.asarray, watch(model, *inputs))
    ordinary = np.asarray(hidden(model, *inputs[:3]))
    np.testing.assert_allclose(seen, ordinary, atol=1e-5 * np.abs(ordinary).max())
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert (weights[~np.broadcast_to(masks[:, :, None], weights.shape)] == 0).all()
    assert (weights >= 0).all() and (weights > 0).any()
    return weights


def tiny_inputs(images: int = 1) -> tuple[jax.Array, ...]:
    """Two rows of three prompt and four answer tokens."""
    batch = prompts([7, 7], 7, images)
    mask_ar = np.tile(np.arange(7) >= 3, (2, 1)).astype(np.int32)
    mask_input = np.ones((2, 7), bool)
    return tuple(map(jnp.asarray, (batch.images, batch.tokens, mask_ar, mask_input)))


@pytest.mark.parametrize(
    "llm, window, images",
    [(GEMMA, None, 1), (GEMMA2, None, 2), (GEMMA2, 3, 1), (GEMMA, None, 0)],
    ids=["gemma", "gemma2-two-images", "gemma2-window", "no-image"],
)
def test_hidden_states_are_those_of_the_ordinary_pass(
    llm: GemmaConfig, window: int | None, images: int
):
    check(random_model(tiny_config(llm, sliding_window=window)), *tiny_inputs(images))


@pytest.mark.parametrize("name", BIG_VISION)
def test_big_vision_goldens(name: str):
    golden = big_vision(name)
    image = golden["image"]
    images = jnp.asarray(image if image.ndim == 5 else image[:, None])
    tokens, mask_ar = (jnp.asarray(golden[key])[:, :-1] for key in ("text", "mask_ar"))
    check(golden.model(), images, tokens, mask_ar, jnp.ones(tokens.shape, bool))


def test_window_of_the_hugging_face_golden():
    """Even layers look back six places; odd layers and the prompt see everything."""
    golden = hugging_face("pg2_sw")
    patches = golden.config.img.num_patches
    images = jnp.asarray(hugging_face_images(golden)[:1])[:, None]
    tokens = jnp.asarray(golden["input_ids"][:, patches:], jnp.int32)
    mask_ar = jnp.asarray(golden["token_type_ids"][:, patches:], jnp.int32)
    inputs = (images, tokens, mask_ar, jnp.ones(tokens.shape, bool))
    weights = check(golden.model(sliding_window=6), *inputs)
    last = weights[:, 0, :, -1]  # [L, N, S]
    assert (last[::2, :, :-6] == 0).all() and (last[::2, :, -6:] > 0).all()
    assert (last[1::2] > 0).all()


def test_cap_and_heads_by_their_definition():
    """Weights of the first layer from its queries and keys, one head after another."""
    images, tokens, mask_ar, mask_input = tiny_inputs()
    model = random_model(tiny_config(GEMMA2, attn_logit_softcap=0.5))
    weights = np.asarray(watch(model, images, tokens, mask_ar, mask_input)[1])[0]
    encoded = jax.jit(lambda model, images: model.encode_images(images))(model, images)
    x = jnp.concatenate([encoded, model.llm.embedder.encode(tokens)], axis=1)
    graphdef, params = nnx.split(model.llm.layers)
    block: Any = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], params))
    q, k, _ = block.project(x, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    logits = np.einsum("btnh,bnsh->bnts", q, np.repeat(k, 2, axis=1))
    exponents = np.exp(0.5 * np.tanh(logits / 0.5))
    row = exponents[:, :, -1] / exponents[:, :, -1].sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(weights[:, :, -1], row, atol=1e-5)


def test_padding_is_looked_at_by_none():
    model = random_model(tiny_config(GEMMA2))
    batch = prompts([2, 5], 6)
    inputs = (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)
    weights = np.asarray(watch(model, *map(jnp.asarray, inputs))[1])
    real = np.pad(batch.mask_input, ((0, 0), (4, 0)), constant_values=True)
    for row, valid in enumerate(real):
        seen = weights[:, row][:, :, valid]
        assert (seen[..., ~valid] == 0).all()
        np.testing.assert_allclose(seen.sum(axis=-1), 1, atol=1e-5)


def test_weights_are_float32_in_bfloat16():
    model = random_model(tiny_config(GEMMA2), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    seen, weights, _ = watch(model, *tiny_inputs())
    assert seen.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(weights).sum(axis=-1), 1, atol=1e-5)
