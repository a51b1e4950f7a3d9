"""Properties of the whole model that no reference vector is needed for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig
from paligemma_jax.generation.decode import prefill
from paligemma_jax.models.attention import soft_cap
from paligemma_jax.models.paligemma import PaliGemma, from_params, to_params
from tests.goldens import assert_close
from tests.tiny import (
    GEMMA,
    GEMMA2,
    SIGLIP,
    VOCAB,
    prompts,
    random_images,
    random_model,
    random_tokens,
    tiny_config,
)

forward = jax.jit(lambda model, images, tokens, mask_ar: model(images, tokens, mask_ar))
extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache))

LENGTHS = [2, 5, 3]  # of the prompts
WIDTH = 6  # to which they are padded
STEPS = 4  # tokens after each


def conversations(images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, tokens and mask_ar of prompts directly followed by answers, padded on the right."""
    tokens = random_tokens(len(LENGTHS), WIDTH + STEPS)
    place = np.arange(WIDTH + STEPS)[None]
    length = np.array(LENGTHS)[:, None]
    tokens = np.where(place < length + STEPS, tokens, 0).astype(np.int32)
    return random_images(len(LENGTHS), images), tokens, (place >= length).astype(np.int32)


def run_prefill(model: PaliGemma, images: np.ndarray, tokens: np.ndarray, slots: int):
    """Prefill of the prompts in `tokens`."""
    real = np.arange(WIDTH)[None] < np.array(LENGTHS)[:, None]
    shown = np.where(real, tokens[:, :WIDTH], 0).astype(np.int32)
    inputs = (images, shown, (~real).astype(np.int32), real)
    return prefill(model, *map(jnp.asarray, inputs), slots)


@pytest.mark.parametrize(
    "llm, window, images",
    [(GEMMA, None, 1), (GEMMA, 3, 0), (GEMMA2, None, 0), (GEMMA2, None, 2), (GEMMA2, 3, 1)],
    ids=["gemma", "gemma-window-text", "gemma2-text", "gemma2-two-images", "gemma2-window"],
)
def test_prefill_and_extend_equal_forward(llm: GemmaConfig, window: int | None, images: int):
    """In a ragged batch, after the prompt and after every token of the answer."""
    model = random_model(tiny_config(llm, sliding_window=window))
    inputs = conversations(images)
    expected = np.asarray(forward(model, *map(jnp.asarray, inputs)))
    tokens, rows = inputs[1], np.arange(len(LENGTHS))
    slots = images * SIGLIP.num_patches + WIDTH + STEPS
    logits, cache = run_prefill(model, inputs[0], tokens, slots)
    place = np.array(LENGTHS)
    assert_close(logits, expected[rows, place - 1])
    for _ in range(STEPS):
        logits, cache = extend(model, jnp.asarray(tokens[rows, place]), cache)
        assert_close(logits, expected[rows, place])
        place += 1


def test_window_is_felt():
    """Without it the case above would test nothing."""
    inputs = [jnp.asarray(x) for x in conversations(1)]
    narrow = forward(random_model(tiny_config(GEMMA2, sliding_window=3)), *inputs)
    wide = forward(random_model(tiny_config(GEMMA2)), *inputs)
    assert_close(narrow[0, 0], wide[0, 0])  # a prompt's tokens see the whole prompt
    assert np.abs(narrow[0, 3] - wide[0, 3]).max() > 1e-2


@pytest.fixture(scope="module")
def conversation(tiny_model: PaliGemma) -> tuple[list[np.ndarray], np.ndarray]:
    """Inputs with one image, and their logits."""
    inputs = list(conversations(1))
    return inputs, np.asarray(forward(tiny_model, *map(jnp.asarray, inputs)))


def logits_with(model: PaliGemma, inputs: list[np.ndarray], row: int, place: int) -> np.ndarray:
    """Logits of one row after another token at `place`."""
    images, tokens, mask_ar = inputs
    tokens = tokens.copy()
    tokens[row, place] = 3 + (tokens[row, place] - 2) % (VOCAB - 3)
    return np.asarray(forward(model, *map(jnp.asarray, (images, tokens, mask_ar))))[row]


def test_answer_tokens_do_not_change_what_stands_before(tiny_model: PaliGemma, conversation):
    inputs, logits = conversation
    for row, length in enumerate(LENGTHS):
        for place in (length, length + 2):
            changed = logits_with(tiny_model, inputs, row, place)
            np.testing.assert_array_equal(changed[:place], logits[row, :place])
            assert (np.abs(changed - logits[row])[place : length + STEPS].max(axis=1) > 1e-3).all()


def test_prompt_tokens_change_everything(tiny_model: PaliGemma, conversation):
    inputs, logits = conversation
    for row, length in enumerate(LENGTHS):
        changed = logits_with(tiny_model, inputs, row, length - 1)
        assert (np.abs(changed - logits[row])[: length + STEPS].max(axis=1) > 1e-4).all()


def test_rows_do_not_see_each_other(tiny_model: PaliGemma, conversation):
    inputs, logits = conversation
    reverse = [jnp.asarray(x[::-1]) for x in inputs]
    assert_close(forward(tiny_model, *reverse)[::-1], logits, atol=1e-5)


def test_padding_changes_nothing(tiny_model: PaliGemma, conversation):
    inputs, logits = conversation
    images, tokens, mask_ar = inputs
    wider = np.pad(tokens, ((0, 0), (0, 3))), np.pad(mask_ar, ((0, 0), (0, 3)), constant_values=1)
    padded = forward(tiny_model, jnp.asarray(images), *map(jnp.asarray, wider))
    for row, length in enumerate(LENGTHS):
        end = length + STEPS
        assert_close(padded[row, :end], logits[row, :end], atol=1e-5)


def test_prefill_of_a_row_alone_equals_the_row_in_a_ragged_batch(tiny_model: PaliGemma):
    batch = prompts(LENGTHS, WIDTH)
    inputs = [np.asarray(x) for x in (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)]
    together, _ = prefill(tiny_model, *map(jnp.asarray, inputs), slots=10)
    row, length = 1, LENGTHS[1]
    images, *text = [x[row : row + 1] for x in inputs]
    text = [x[:, :length] for x in text]
    alone, _ = prefill(tiny_model, *map(jnp.asarray, (images, *text)), slots=9)
    assert_close(alone[0], together[row], atol=1e-5)


def test_padding_may_be_marked_as_prompt(tiny_model: PaliGemma):
    """big_vision pads mask_ar with 1 in its configs, with 0 in its notebook; mask_input decides."""
    batch = prompts(LENGTHS, WIDTH)
    inputs = [jnp.asarray(x) for x in (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)]
    logits, _ = prefill(tiny_model, *inputs, slots=10)
    inputs[2] = jnp.zeros_like(inputs[2])
    assert_close(prefill(tiny_model, *inputs, slots=10)[0], logits, atol=1e-5)


def test_images_are_seen_in_their_order(tiny_model: PaliGemma):
    images = jnp.asarray(random_images(1, 2))
    tokens = jnp.asarray(random_tokens(1, 3))
    mask_ar = jnp.zeros_like(tokens)
    logits = forward(tiny_model, images, tokens, mask_ar)
    swapped = forward(tiny_model, images[:, ::-1], tokens, mask_ar)
    assert np.abs(logits - swapped).max() > 1e-2
    encode = jax.jit(lambda model, images: model.encode_images(images))
    one_by_one = encode(tiny_model, images[0, :, None])
    assert_close(encode(tiny_model, images)[0], one_by_one.reshape(-1, one_by_one.shape[-1]))


def test_final_cap_is_applied_to_every_logit():
    """With the tests of prefill and extend above: after the prompt and at every step alike."""
    capped = random_model(tiny_config(GEMMA2, final_logit_softcap=3.0))
    free = random_model(tiny_config(GEMMA2, final_logit_softcap=0.0))
    inputs = [jnp.asarray(x) for x in conversations(1)]
    logits = forward(free, *inputs)
    assert_close(forward(capped, *inputs), soft_cap(logits, 3.0))
    assert np.abs(logits).max() > 3.0


def test_bfloat16_is_near_float32(tiny_config: PaliGemmaConfig, conversation):
    inputs, logits = conversation
    half = random_model(tiny_config, dtype=jnp.bfloat16)
    rounded = forward(half, *map(jnp.asarray, inputs))
    assert rounded.dtype == jnp.float32 and np.isfinite(rounded).all()
    assert np.sqrt(np.mean(np.square(rounded - logits))) < 0.05 * logits.std()


def test_cache_has_the_dtype_of_the_activations(tiny_config: PaliGemmaConfig):
    images, tokens, _ = conversations(1)
    model = random_model(tiny_config, dtype=jnp.bfloat16)
    _, cache = run_prefill(model, images, tokens, slots=12)
    assert {leaf.dtype for leaf in jax.tree.leaves((cache.k, cache.v))} == {jnp.dtype(jnp.bfloat16)}
    assert int(cache.length) == SIGLIP.num_patches + WIDTH
    np.testing.assert_array_equal(cache.valid.sum(axis=1), np.array(LENGTHS) + SIGLIP.num_patches)


def test_params_go_in_and_out_without_a_copy(tiny_config: PaliGemmaConfig, tiny_model: PaliGemma):
    params = to_params(tiny_model)
    again = to_params(from_params(tiny_config, params, jnp.bfloat16))
    leaves, others = jax.tree.leaves(params), jax.tree.leaves(again)
    assert jax.tree.structure(params) == jax.tree.structure(again)
    assert all(leaf is other for leaf, other in zip(leaves, others, strict=True))


def test_gradients_reach_every_weight(tiny_model: PaliGemma, conversation):
    """But the keys' biases, to which softmax is blind."""
    inputs = [jnp.asarray(x) for x in conversation[0]]
    weights = jax.random.normal(jax.random.key(0), conversation[1].shape)
    gradients = jax.jit(jax.grad(lambda model: jnp.sum(weights * model(*inputs))))(tiny_model)
    norms = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(jnp.abs(leaf).max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(to_params(gradients))
    }
    assert len(norms) == 34
    assert norms.pop("img/blocks/attn/k/bias") < 1e-3
    assert min(norms.values()) > 1e-3
