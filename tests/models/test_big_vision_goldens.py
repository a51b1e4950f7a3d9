"""The model gives big_vision's outputs, losses and gradients on big_vision's own small models.

All numbers are held to a float64 computation, see `tests.goldens.assert_as_exact`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.decode import prefill
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma, flatten, to_params
from paligemma_jax.training.step import loss_weights, token_nll
from paligemma_jax.weights.big_vision import big_vision_name
from tests.goldens import (
    BIG_VISION,
    Golden,
    assert_as_exact,
    assert_gradient_norms,
    big_vision,
    optimized,
    prompt,
)

pytestmark = pytest.mark.parametrize("name", BIG_VISION)


@functools.cache
def outputs(name: str) -> dict[str, Any]:
    """All that teacher forcing gives, end to end from images and text."""
    golden = big_vision(name)
    image, text, mask_ar = (jnp.asarray(golden[key]) for key in ("image", "text", "mask_ar"))

    def forward(model: PaliGemma) -> dict[str, jax.Array]:
        embeddings = model.encode_images(image)
        return dict(
            encoded=model.img.encode(image.reshape(-1, *image.shape[-3:])),
            embeddings=embeddings,
            logits=model.forward(embeddings, text[:, :-1], mask_ar[:, :-1]),
        )

    with optimized():
        return jax.jit(forward)(golden.model(final_logit_softcap=0.0))


def losses(name: str, logits: jax.Array, smoothing: float = 0.0) -> jax.Array:
    golden = big_vision(name)
    text, mask_loss = (jnp.asarray(golden[key])[:, 1:] for key in ("text", "mask_loss"))
    nll = token_nll(logits, text, smoothing)
    return len(text) * jnp.sum(nll * loss_weights(mask_loss), axis=1)


@functools.cache
def gradients(name: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The batch's loss, and its gradient by path of ours."""
    golden = big_vision(name)
    image, text, mask_ar = (jnp.asarray(golden[key]) for key in ("image", "text", "mask_ar"))

    def loss(model: PaliGemma) -> jax.Array:
        return jnp.mean(losses(name, model(image, text[:, :-1], mask_ar[:, :-1])))

    value, tree = jax.jit(jax.value_and_grad(loss))(golden.model(final_logit_softcap=0.0))
    return value, flatten(to_params(tree))


def test_image_encoder(name: str):
    golden = big_vision(name)
    expected = golden["image_encoder_out"]
    exact = golden.exact.image_encoder_out.reshape(expected.shape)
    assert_as_exact(outputs(name)["encoded"].reshape(expected.shape), expected, exact)


def test_image_embeddings(name: str):
    golden = big_vision(name)
    exact = golden.exact.image_embeddings
    assert_as_exact(outputs(name)["embeddings"], golden["image_embeddings"], exact)


def test_attention_mask(name: str):
    golden = big_vision(name)
    patches = golden["image_embeddings"].shape[1]
    mask_ar = jnp.pad(golden["mask_ar"][:, :-1], ((0, 0), (patches, 0)))
    masks = golden.model().attention_masks(mask_ar, jnp.ones(mask_ar.shape, bool))
    np.testing.assert_array_equal(masks, golden["train_attn_mask"][None])


def test_teacher_forced_logits(name: str):
    golden = big_vision(name)
    exact = golden.exact.train_logits
    assert_as_exact(outputs(name)["logits"], golden["train_logits"], exact)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_each_example(name: str, smoothing: float):
    actual, golden = losses(name, outputs(name)["logits"], smoothing), big_vision(name)
    assert_as_exact(actual, golden[f"loss_plain_ls{smoothing}"], golden.exact.loss(smoothing))


def test_loss_of_the_batch(name: str):
    golden, exact = big_vision(name), big_vision(name).exact.loss().mean()
    assert_as_exact(jnp.mean(losses(name, outputs(name)["logits"])), golden["loss"], exact)
    assert_as_exact(gradients(name)[0], golden["loss"], exact)


def test_gradient_norms(name: str):
    gradient = gradients(name)[1]
    assert_gradient_norms(
        name, {big_vision_name(k): float(jnp.linalg.norm(g.ravel())) for k, g in gradient.items()}
    )


def _room(golden: Golden) -> int:
    steps = golden["greedy_tokens"].shape[1]
    return golden["image_embeddings"].shape[1] + golden["prompt_text"].shape[1] + steps


def test_logits_after_the_prompt(name: str):
    golden = big_vision(name)
    with optimized():
        logits, _ = prefill(golden.model(final_logit_softcap=0.0), *prompt(golden), _room(golden))
    assert_as_exact(logits, golden["prefill_last_logits"], golden.exact.prefill_last_logits)


def test_decoder_alone(name: str):
    """From big_vision's image embeddings: teacher forced, after the prompt, and at every step.

    From the second token on big_vision applies the final cap, so there ours has it.
    """
    golden = big_vision(name)
    embeddings, text, mask_ar = (
        jnp.asarray(golden[key]) for key in ("image_embeddings", "text", "mask_ar")
    )

    @jax.jit
    def run(model: PaliGemma) -> tuple[jax.Array, tuple[jax.Array, KVCache]]:
        forced = model.forward(embeddings, text[:, :-1], mask_ar[:, :-1])
        return forced, model.prefill(embeddings, *prompt(golden)[1:], slots=_room(golden))

    forced, (after_prompt, cache) = run(golden.model(final_logit_softcap=0.0))
    exact, theirs = golden.exact, golden["image_embeddings"]
    assert_as_exact(forced, golden["train_logits"], exact.forced(theirs))
    exact_step = exact.after_prompt(theirs)[:, 0]
    assert_as_exact(after_prompt, golden["prefill_last_logits"], exact_step)
    softcap = 30.0 if name == "pg2_softcap" else 0.0
    capped = golden.model(final_logit_softcap=softcap)
    extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache))
    logits = []
    for tokens in jnp.asarray(golden["greedy_tokens"][:, :-1]).T:
        step, cache = extend(capped, tokens, cache)
        logits.append(step)
    exact_steps = exact.after_prompt(theirs, softcap)[:, 1:]
    assert_as_exact(jnp.stack(logits, axis=1), golden["greedy_step_logits"], exact_steps)
