"""The model gives transformers' outputs on small models saved by transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.training.step import token_nll
from tests.goldens import (
    HUGGING_FACE,
    Golden,
    assert_as_exact,
    assert_close,
    hugging_face,
    hugging_face_images,
)

WINDOW = {"pg2_sw": 6}  # the others have Gemma 2's 4096, which no sequence here reaches


def forward(golden: Golden, window: int | None) -> jax.Array:
    """Logits at the text positions of the one example with an answer."""
    model = golden.model(sliding_window=window)
    patches = golden.config.img.num_patches
    images = jnp.asarray(hugging_face_images(golden)[:1])
    tokens = jnp.asarray(golden["input_ids"][:, patches:], jnp.int32)
    mask_ar = jnp.asarray(golden["token_type_ids"][:, patches:], jnp.int32)
    return jax.jit(lambda model, *inputs: model(*inputs))(model, images, tokens, mask_ar)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_vision(name: str):
    golden = hugging_face(name)
    model = golden.model()
    images = jnp.asarray(hugging_face_images(golden)[:1])
    encode = jax.jit(lambda model, images: (model.img.encode(images), model.encode_images(images)))
    encoded, features = encode(model, images)
    image, reference = hugging_face_images(golden)[0], golden.reference()
    assert_as_exact(encoded, golden["vision_last_hidden"], reference.encode(image)[None])
    expected = golden["image_features"]
    exact = reference.embed_image(image).reshape(expected.shape)
    assert_as_exact(features.reshape(expected.shape), expected, exact)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_logits_and_loss(name: str):
    golden = hugging_face(name)
    patches = golden.config.img.num_patches
    logits = forward(golden, WINDOW.get(name))
    reference = golden.reference(sliding_window=WINDOW.get(name))
    image_tokens = reference.embed_image(hugging_face_images(golden)[0])
    ids, causal = golden["input_ids"][0, patches:], golden["token_type_ids"][0, patches:] == 1
    exact = reference.logits(image_tokens, ids[~causal], ids[causal])[None]
    theirs = golden["logits"][:, patches:, : golden.config.llm.vocab_size]
    assert_as_exact(logits, theirs, exact)
    labels = golden["labels"][:, patches + 1 :]
    supervised = labels != -100
    nll = token_nll(logits[:, :-1], jnp.asarray(np.where(supervised, labels, 0), jnp.int32))
    # Hugging Face takes the mean over the batch's tokens; with one example it is ours too.
    loss = reference.loss(image_tokens, ids[~causal], ids[causal], np.r_[0, supervised[0]])
    assert_as_exact(np.asarray(nll)[supervised].mean(), golden["loss_real"], loss)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_configuration_brings_the_final_cap(name: str):
    assert hugging_face(name).config.llm.final_logit_softcap == (0.0 if name == "pg1" else 30.0)


def test_sliding_window_is_an_option():
    """pg2_sw has pg2's weights: without the window its logits are pg2's, with it they are not."""
    sliding, plain = hugging_face("pg2_sw"), hugging_face("pg2")
    full = forward(sliding, None)
    assert_close(full, plain["logits"][:, 4:, :256])
    assert np.abs(full - sliding["logits"][:, 4:, :256]).max() > 1.0


@pytest.mark.parametrize("window", [5, 4096])
def test_a_window_longer_than_the_sequence_changes_nothing(window: int):
    golden = hugging_face("pg2")
    changed = np.abs(forward(golden, window) - golden["logits"][:, 4:, :256]).max()
    assert (changed > 1e-2) == (window == 5)
