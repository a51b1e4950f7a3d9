"""Attention of answer tokens to image patches: the right rows, columns and averages of it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import Shape, held_out_scenes
from paligemma_jax.demo.tasks import FULL_LABELS, detect_answer
from paligemma_jax.errors import ConfigError, InvalidImageError, InvalidPromptError
from paligemma_jax.generation.attention_maps import image_attention_maps
from paligemma_jax.models.attention_maps import AttentionRollout, EveryHead, MeanAttention
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.tiny import VOCAB, prompts

ANSWERS = [[7, 8, 9], [], [11]]
LENGTHS = [2, 5, 3]
PATCHES = 4


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Three prompts about two images each, and a prompt that only fills the batch."""
    batch = prompts([*LENGTHS, 2], 6, number_of_images=2)
    return dataclasses.replace(batch, row_mask=np.array([True, True, True, False]))


@pytest.fixture(scope="module")
def every(tiny_model: PaliGemma, batch: Batch) -> list[np.ndarray]:
    return image_attention_maps(tiny_model, batch, ANSWERS, summary=EveryHead())


def test_a_map_for_each_token_and_picture(tiny_model: PaliGemma, every: list[np.ndarray]):
    c = tiny_model.config.llm
    for maps, answer in zip(every, ANSWERS, strict=True):
        assert maps.shape == (c.depth, c.num_heads, len(answer), 2, 2, 2)
        assert maps.dtype == np.float32
        shares = maps.sum(axis=(-3, -2, -1))
        assert ((shares > 0) & (shares < 1)).all()


def test_each_token_is_seen_from_the_place_before_it(
    tiny_model: PaliGemma, batch: Batch, every: list[np.ndarray]
):
    """By a pass of one row, without padding, that keeps everything."""
    row, length, answer = 0, LENGTHS[0], ANSWERS[0]
    tokens = np.array([[*batch.tokens[row, :length], *answer]], np.int32)
    mask_ar = (np.arange(tokens.shape[1]) >= length).astype(np.int32)[None]
    assert batch.images is not None
    images = jnp.asarray(batch.images[row : row + 1])

    def keep(seen, weights, layer):
        return seen.at[layer].set(weights[0])

    c = tiny_model.config.llm
    size = 2 * PATCHES + tokens.shape[1]
    _, weights = tiny_model.hidden_with_attention(
        tiny_model.encode_images(images),
        jnp.asarray(tokens),
        jnp.asarray(mask_ar),
        jnp.ones(tokens.shape, bool),
        keep,
        jnp.zeros((c.depth, c.num_heads, size, size)),
    )
    first = 2 * PATCHES + length - 1  # the prompt's last token chooses the answer's first
    wanted = np.asarray(weights)[:, :, first : first + len(answer), : 2 * PATCHES]
    np.testing.assert_allclose(every[row].reshape(wanted.shape), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "layers, heads", [(None, None), ((-1,), None), ((0, 2), (1,)), (None, (0, 3))]
)
def test_means(tiny_model: PaliGemma, batch: Batch, every: list[np.ndarray], layers, heads):
    summary = MeanAttention(layers=layers, heads=heads)
    maps = image_attention_maps(tiny_model, batch, ANSWERS, summary=summary)
    for mean, full in zip(maps, every, strict=True):
        full = full if layers is None else full[list(layers)]
        full = full if heads is None else full[:, list(heads)]
        np.testing.assert_allclose(mean, full.mean(axis=(0, 1)), atol=1e-6)


def test_rollout_by_its_definition(tiny_model: PaliGemma):
    batch = prompts([3], 3)
    answer = [7, 8]
    rollout = image_attention_maps(tiny_model, batch, [answer], summary=AttentionRollout())[0]
    tokens = jnp.asarray([[*batch.tokens[0], *answer]])
    mask_ar = jnp.asarray([[0, 0, 0, 1, 1]])
    encoded = tiny_model.encode_images(jnp.asarray(batch.images))
    _, layers = tiny_model.hidden_with_attention(
        encoded,
        tokens,
        mask_ar,
        jnp.ones((1, 5), bool),
        lambda seen, weights, layer: seen.at[layer].set(weights[0].mean(axis=0)),
        jnp.zeros((tiny_model.config.llm.depth, 9, 9)),
    )
    product = np.eye(9)
    for layer in np.asarray(layers):
        product = (layer + np.eye(9)) / 2 @ product
    np.testing.assert_allclose(product.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(rollout.reshape(2, 4), product[[6, 7], :4], atol=1e-5)


def test_answers_that_do_not_fit(tiny_model: PaliGemma, batch: Batch):
    with pytest.raises(InvalidPromptError, match="each of 3 prompts"):
        image_attention_maps(tiny_model, batch, [[3], [4]])
    with pytest.raises(InvalidPromptError, match=rf"answers\[2\]: .*got {VOCAB}"):
        image_attention_maps(tiny_model, batch, [[3], [4], [5, VOCAB]])


def test_no_picture(tiny_model: PaliGemma, batch: Batch):
    with pytest.raises(InvalidImageError, match="with images"):
        image_attention_maps(tiny_model, dataclasses.replace(batch, images=None), ANSWERS)


@pytest.mark.parametrize("summary", [MeanAttention(layers=(3,)), MeanAttention(heads=())])
def test_layers_and_heads_that_are_not_there(tiny_model: PaliGemma, batch: Batch, summary):
    with pytest.raises(ConfigError, match="Expected (heads|layers) from"):
        image_attention_maps(tiny_model, batch, ANSWERS, summary=summary)


SCENES = 16


def coverage(shape: Shape, side: int) -> np.ndarray:
    """f32[side, side]: the share of each patch that lies in the shape's box."""
    edges = np.linspace(0, 1, side + 1)
    y1, x1, y2, x2 = shape.box

    def along(low: float, high: float) -> np.ndarray:
        inside = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
        return np.clip(inside, 0, None) * side

    return np.outer(along(y1, y2), along(x1, x2))


def test_location_tokens_look_at_their_shape_more_than_elsewhere():
    """Attention per area is at least 1.5 times as high in the box; most is outside all the same."""
    pali = pg.from_pretrained("demo", dtype="float32")
    images, asked, shapes = [], [], []
    for scene in held_out_scenes(count=80):
        alone = [label for label in FULL_LABELS if len(label.find(scene)) == 1]
        if len(scene.shapes) > 1 and alone and len(images) < SCENES:
            label = alone[len(images) % len(alone)]
            images.append(Image.fromarray(render(scene, 112)))
            asked.append(detect_answer(scene, [label]))
            shapes.append(label.find(scene)[0])
    assert len(images) == SCENES
    answers = [pali.processor.tokenizer.encode(example.answer) for example in asked]
    batch = pali.processor(images, [example.prompt for example in asked])
    inside, areas = [], []
    for maps, shape in zip(image_attention_maps(pali.model, batch, answers), shapes, strict=True):
        located = maps[:4, 0].sum(axis=0)
        covered = coverage(shape, located.shape[-1])
        inside.append((located * covered).sum() / located.sum())
        areas.append(covered.mean())
    density = np.mean(inside) / np.mean(areas)
    elsewhere = (1 - np.mean(inside)) / (1 - np.mean(areas))
    print(f"inside {np.mean(inside):.3f} of area {np.mean(areas):.3f}, {density / elsewhere:.2f} x")
    assert density / elsewhere > 1.5
