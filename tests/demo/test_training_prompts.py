"""Prompts that only training asks: weighted draws, and masks as tokens."""

import collections
import dataclasses
import re

import numpy as np
import pytest
from flax import nnx

from checkpoints.training.prompts import (
    MaskCodes,
    codec_crop,
    sample_examples,
    sample_segment,
    segment_answer,
)
from paligemma_jax.demo.scene import Scene, Shape, box_around, extent
from paligemma_jax.demo.tasks import Label
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.processing.masks import MaskCodec
from tests.demo.test_tasks import SCENE, WORD


def test_weights_choose_the_tasks():
    rng = np.random.default_rng(0)
    only = sample_examples(SCENE, rng, 3, {"count": 1.0})
    assert len(only) == 3 and {example.task for example in only} == {"count"}
    assert len(sample_examples(SCENE, rng, 5, {"caption_en": 1.0})) == 5
    with pytest.raises(ValueError, match="caption_en"):
        sample_examples(Scene(shapes=(), text=WORD, background=0), rng, 1, {"color": 1.0})


CODES = MaskCodes(
    {("circle", 0, 0): tuple(range(16)), ("square", 0, 0): (127,) * 16, ("star", 0, 5): (1,) * 16}
)


def test_segment_writes_box_then_codes_then_label():
    circles = segment_answer(SCENE, [Label("red", "circle")], CODES)
    assert circles.prompt == "segment red circle"
    masks = "".join(f"<seg{i:03d}>" for i in range(16))
    first, second = circles.answer.split(" ; ")
    assert re.fullmatch(rf"(<loc\d{{4}}>){{4}}{masks} red circle", first)
    assert re.fullmatch(rf"(<loc\d{{4}}>){{4}}{masks} red circle", second)
    both = segment_answer(SCENE, [Label("blue", "square"), Label("red", "star")], CODES)
    assert both.prompt == "segment blue square ; red star"
    assert both.answer.count("<seg127>") == both.answer.count("<seg001>") == 16
    assert segment_answer(SCENE, [Label("green", "circle")], CODES).answer == ""


def test_segment_asks_for_two_masks_at_most():
    counts = collections.Counter()
    for seed in range(200):
        example = sample_segment(SCENE, np.random.default_rng(seed), CODES)
        assert example is not None
        counts[example.answer.count("<seg") // 16] += 1
    assert set(counts) == {0, 1, 2} and counts[0] < counts[1]


def test_codes_of_a_shape_are_those_of_its_mask():
    codec = MaskCodec(MaskVAE(MaskVAEConfig(embedding_dim=8), rngs=nnx.Rngs(0)))
    star = Shape(kind="star", color="red", box=(0.2, 0.3, 0.5, 0.6), angle=3.0, style=0.5)
    height, width = extent("star", 3.0, 0.5)
    large = dataclasses.replace(star, box=box_around(0.5, 0.5, 0.9 * height, 0.9 * width))
    key = ("star", 6, 5)
    codes = MaskCodes({key: tuple(codec.encode(codec_crop(large)[None])[0].tolist())})
    assert codes.tokens(star).count("<seg") == 16
    # The small star's own crop decodes to nearly the same mask.
    crops = codec_crop(large) > 0.5, codec_crop(star) > 0.5
    assert (crops[0] & crops[1]).sum() / (crops[0] | crops[1]).sum() > 0.8
