"""The model gives big_vision's outputs, losses and gradients on big_vision's own small models."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.decode import prefill
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma, flatten, to_params
from paligemma_jax.training.step import per_example_loss
from paligemma_jax.weights.big_vision import big_vision_name
from tests.goldens import (
    BIG_VISION,
    SAME_ROUNDING,
    Golden,
    assert_close,
    assert_close_end_to_end,
    big_vision,
    optimized,
    prompt,
)

pytestmark = pytest.mark.parametrize("name", BIG_VISION)

# Relative: norms sum the rounding errors of a whole backward pass, and go from 0.1 to 200.
GRADIENT_RTOL = 1e-4 if SAME_ROUNDING else 1e-3
# Softmax is blind to a constant added to all keys: the gradient is zero but for rounding.
ZERO_GRADIENT = "img/blocks/attn/k/bias"


@functools.cache
def outputs(name: str) -> dict[str, Any]:
    """All that teacher forcing gives, end to end from pictures and text."""
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
    return per_example_loss(logits, text, mask_loss, smoothing)


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
    assert_close(outputs(name)["encoded"], big_vision(name)["image_encoder_out"])


def test_image_embeddings(name: str):
    assert_close(outputs(name)["embeddings"], big_vision(name)["image_embeddings"])


def test_attention_mask(name: str):
    golden = big_vision(name)
    patches = golden["image_embeddings"].shape[1]
    mask_ar = jnp.pad(golden["mask_ar"][:, :-1], ((0, 0), (patches, 0)))
    masks = golden.model().attention_masks(mask_ar, jnp.ones(mask_ar.shape, bool))
    np.testing.assert_array_equal(masks, golden["train_attn_mask"][None])


def test_teacher_forced_logits(name: str):
    assert_close_end_to_end(outputs(name)["logits"], big_vision(name)["train_logits"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_each_example(name: str, smoothing: float):
    actual = losses(name, outputs(name)["logits"], smoothing)
    assert_close(actual, big_vision(name)[f"loss_plain_ls{smoothing}"])


def test_loss_of_the_batch(name: str):
    assert_close(jnp.mean(losses(name, outputs(name)["logits"])), big_vision(name)["loss"])
    assert_close(gradients(name)[0], big_vision(name)["loss"])


def test_gradient_norms(name: str):
    golden = big_vision(name)
    norms = {path: float(jnp.linalg.norm(g.ravel())) for path, g in gradients(name)[1].items()}
    prefix = "grad_norm/"
    expected = {k.removeprefix(prefix): v for k, v in golden.arrays.items() if k.startswith(prefix)}
    assert {big_vision_name(path) for path in norms} == set(expected)
    assert norms.pop(ZERO_GRADIENT) < 1e-4
    actual = np.array(list(norms.values()))
    wanted = np.array([expected[big_vision_name(path)] for path in norms])
    np.testing.assert_allclose(actual, wanted, rtol=GRADIENT_RTOL, err_msg=str(list(norms)))


def _room(golden: Golden) -> int:
    steps = golden["greedy_tokens"].shape[1]
    return golden["image_embeddings"].shape[1] + golden["prompt_text"].shape[1] + steps


def test_logits_after_the_prompt(name: str):
    golden = big_vision(name)
    with optimized():
        logits, _ = prefill(golden.model(final_logit_softcap=0.0), *prompt(golden), _room(golden))
    assert_close_end_to_end(logits, golden["prefill_last_logits"])


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
    assert_close(forced, golden["train_logits"])
    assert_close(after_prompt, golden["prefill_last_logits"])
    capped = golden.model(final_logit_softcap=30.0 if name == "pg2_softcap" else 0.0)
    extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache))
    logits = []
    for tokens in jnp.asarray(golden["greedy_tokens"][:, :-1]).T:
        step, cache = extend(capped, tokens, cache)
        logits.append(step)
    assert_close(jnp.stack(logits, axis=1), golden["greedy_step_logits"])
