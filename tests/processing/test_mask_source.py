"""Masks from files, polygons and run lengths, and the objects made of them."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.processing.location_tokens import format_answer, parse_answer
from paligemma_jax.processing.masks import (
    RLE,
    MaskCodec,
    encode_masks,
    load_mask,
    mask_from_coco,
    paste,
)

MASK = np.zeros((30, 40), bool)
MASK[5:20, 8:33] = True


@pytest.fixture(scope="module")
def codec() -> MaskCodec:
    return MaskCodec(MaskVAE(MaskVAEConfig(embedding_dim=8), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("high", [1, 255])
def test_png_of_any_brightness(tmp_path: Path, high: int):
    path = tmp_path / "mask.png"
    Image.fromarray(MASK.astype(np.uint8) * high).save(path)
    np.testing.assert_array_equal(load_mask(path), MASK)
    np.testing.assert_array_equal(load_mask(str(path)), MASK)


def test_grey_saved_as_rgb_one_bit_and_soft_edges():
    grey = Image.fromarray(MASK.astype(np.uint8) * 255)
    np.testing.assert_array_equal(load_mask(grey.convert("RGB")), MASK)
    np.testing.assert_array_equal(load_mask(grey.convert("1")), MASK)
    soft = MASK * 255
    soft[4, 8:33] = 100  # less than half covered
    soft[20, 8:33] = 140
    wider = MASK.copy()
    wider[20, 8:33] = True
    np.testing.assert_array_equal(load_mask(soft), wider)


def test_one_of_several_instances():
    labels = Image.fromarray(np.where(MASK, 7, 3).astype(np.uint8), mode="P")
    np.testing.assert_array_equal(load_mask(labels, value=7), MASK)
    np.testing.assert_array_equal(load_mask(labels, value=3), ~MASK)
    assert not load_mask(labels, value=1).any()


@pytest.mark.parametrize(
    "source", [np.zeros((4, 4, 4)), np.zeros((0, 4)), np.array([["a"]]), "nowhere.png"]
)
def test_what_is_no_mask(source):
    with pytest.raises(InvalidMaskError):
        load_mask(source)


def test_a_coloured_picture_is_no_mask():
    colours = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    with pytest.raises(InvalidMaskError, match="Choose a channel"):
        load_mask(colours)


def test_coco_of_every_kind():
    rle = RLE.from_mask(MASK)
    for segmentation in (rle.to_coco(), rle.to_coco_uncompressed(), [[8, 5, 33, 5, 33, 20, 8, 20]]):
        np.testing.assert_array_equal(mask_from_coco(segmentation, 30, 40), MASK)


@pytest.mark.parametrize("segmentation", [RLE.from_mask(MASK[:, :20]).to_coco(), [], "x", None, 3])
def test_coco_that_does_not_fit(segmentation):
    with pytest.raises(InvalidMaskError):
        mask_from_coco(segmentation, 30, 40)


def test_masks_become_a_suffix_and_come_back(codec: MaskCodec):
    thin = np.zeros_like(MASK)
    thin[10, 3:30] = True
    objects = encode_masks(codec, [MASK, thin], ["box", ""])
    assert [len(found.codes or ()) for found in objects] == [16, 16]
    parsed = parse_answer(format_answer(objects)).objects
    assert list(parsed) == objects
    box = parsed[0]
    pasted = paste(np.ones((64, 64), np.float32), (box.y1, box.x1, box.y2, box.x2), 30, 40)
    np.testing.assert_array_equal(pasted, MASK)


def test_masks_that_do_not_fit_are_named(codec: MaskCodec):
    with pytest.raises(InvalidMaskError, match=r"masks\[1\].*empty"):
        encode_masks(codec, [MASK, np.zeros_like(MASK)], ["a", "b"])
    with pytest.raises(InvalidMaskError, match="2 masks and 1 labels"):
        encode_masks(codec, [MASK, MASK], ["a"])
    assert encode_masks(codec, [], []) == []
