"""Masks: run lengths, outlines, files, and the crops and codes of the mask codec."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.processing import masks
from paligemma_jax.processing.location_tokens import format_answer, parse_answer
from paligemma_jax.processing.masks import (
    RLE,
    MaskCodec,
    Polygon,
    crop_for_codec,
    encode_masks,
    load_mask,
    mask_from_coco,
    mask_to_polygons,
    paste,
    pixel_corners,
    polygons_to_mask,
    tight_corners,
)

MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def test_columns_first_and_outside_first():
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    rle = RLE.from_mask(mask)
    assert rle == RLE(2, 3, (2, 1, 1, 2)) and rle.area == 3
    assert RLE.from_mask(~mask).counts == (0, 2, 1, 1, 2)


def test_compressed_by_hand():
    # 100 = 00011 00100 in groups of five bits: "more" + 4, then 3; the fourth run is 20 - 100.
    rle = RLE(22, 11, (100, 100, 22, 20))
    groups = [32 + 4, 3, 32 + 4, 3, 22 + 32, 0, 32 + 16, 29]
    assert rle.to_coco() == {"size": [22, 11], "counts": "".join(chr(48 + g) for g in groups)}


@pytest.mark.parametrize("value", [False, True])
def test_uniform(value: bool):
    mask = np.full((3, 5), value)
    rle = RLE.from_mask(mask)
    assert rle.counts == ((0, 15) if value else (15,)) and rle.area == 15 * value
    np.testing.assert_array_equal(rle.to_mask(), mask)


@given(MASKS)
def test_there_and_back(mask: np.ndarray):
    rle = RLE.from_mask(mask)
    np.testing.assert_array_equal(rle.to_mask(), mask)
    assert RLE.from_coco(json.loads(json.dumps(rle.to_coco()))) == rle
    assert RLE.from_coco({"size": list(mask.shape), "counts": list(rle.counts)}) == rle
    assert rle.area == mask.sum()


@settings(deadline=None)
@given(
    MASKS
    | st.integers(0, 99).map(lambda seed: np.random.default_rng(seed).random((90, 70)) < seed / 99)
)
def test_pycocotools_writes_the_same(mask: np.ndarray):
    theirs = pytest.importorskip("pycocotools.mask").encode(np.asfortranarray(mask, np.uint8))
    assert RLE.from_mask(mask).to_coco()["counts"] == theirs["counts"].decode()
    assert RLE.from_coco(theirs) == RLE.from_mask(mask)


@pytest.mark.parametrize(
    "rle",
    [{}, {"size": [2, 3]}, {"size": 4, "counts": [6]}, {"size": [2, 3], "counts": "~"},
     {"size": [2, 3], "counts": "P"}, {"size": [2, 3], "counts": "é".encode()}, [6]],
)  # fmt: skip
def test_no_run_lengths(rle):
    with pytest.raises(InvalidMaskError, match="Expected run lengths"):
        RLE.from_coco(rle)


@pytest.mark.parametrize("counts", [(), (5,), (7,), (7, -1)])
def test_wrong_length(counts: tuple[int, ...]):
    with pytest.raises(InvalidMaskError, match="add to 2 x 3"):
        RLE(2, 3, counts)


@pytest.mark.parametrize(
    "mask", [np.zeros((2, 2)), np.zeros((2, 2, 1), bool), np.zeros((0, 3), bool), [[True]]]
)
def test_no_masks(mask):
    with pytest.raises(InvalidMaskError, match="Expected a mask"):
        RLE.from_mask(mask)


SQUARE = ((1.0, 1.0), (4.0, 1.0), (4.0, 3.0), (1.0, 3.0))


def test_rectangle_covers_its_pixels():
    mask = np.zeros((5, 6), bool)
    mask[1:3, 1:4] = True
    assert mask_to_polygons(mask) == (Polygon(SQUARE),)
    np.testing.assert_array_equal(polygons_to_mask([Polygon(SQUARE)], 5, 6), mask)


def test_hole_and_island():
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    mask[2:7, 2:7] = False
    mask[4, 4] = True
    ring, island = mask_to_polygons(mask)
    assert len(ring.holes) == 1 and not island.holes
    assert set(ring.exterior) == {(1, 1), (8, 1), (8, 8), (1, 8)}
    assert set(ring.holes[0]) == {(2, 2), (7, 2), (7, 7), (2, 7)}
    np.testing.assert_array_equal(polygons_to_mask([ring, island], 9, 9), mask)
    filled = polygons_to_mask([Polygon(ring.exterior)], 9, 9)
    assert filled[1:8, 1:8].all()


def test_pixels_that_touch_at_a_corner_are_two_areas():
    assert len(mask_to_polygons(np.eye(3, dtype=bool))) == 3
    assert mask_to_polygons(np.zeros((3, 3), bool)) == ()


@given(arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_traced_and_filled_is_the_same(mask: np.ndarray):
    polygons = mask_to_polygons(mask)
    np.testing.assert_array_equal(polygons_to_mask(polygons, *mask.shape), mask)
    for polygon in polygons:  # no corner lies on a straight line
        for ring in (polygon.exterior, *polygon.holes):
            points = np.array(ring)
            before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
            assert (before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]).all()


def test_overlapping_polygons_are_joined():
    other = Polygon(tuple((x + 1, y) for x, y in SQUARE))
    assert polygons_to_mask([Polygon(SQUARE), other], 5, 6).sum() == 8


def test_slanted_sides_follow_the_centres_of_pixels():
    triangle = Polygon.from_coco([0, 0, 8, 0, 0, 8])
    rows, columns = np.mgrid[:8, :8] + 0.5
    np.testing.assert_array_equal(polygons_to_mask([triangle], 8, 8), rows + columns < 8)


def test_pycocotools_agrees_within_the_outline():
    coco = pytest.importorskip("pycocotools.mask")
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    points = np.stack([50 + 40 * np.cos(angles), 40 + 30 * np.sin(angles)], 1).ravel().tolist()
    theirs = coco.decode(coco.frPyObjects([points], 80, 100))[..., 0].astype(bool)
    ours = polygons_to_mask([Polygon.from_coco(points)], 80, 100)
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97


@pytest.mark.parametrize(
    "numbers, message",
    [([], "got 0"), ([1, 1, 2, 2], "got 2"), ([1, 1, 2, 2, 3], "5 numbers")],
)
def test_no_polygons(numbers: list[float], message: str):
    with pytest.raises(InvalidMaskError, match=message):
        Polygon.from_coco(numbers)


@pytest.mark.parametrize("far", [-2.0, 8.0, float("nan"), float("inf")])
def test_outside_of_the_picture(far: float):
    with pytest.raises(InvalidMaskError, match="inside the image of 6 x 5"):
        polygons_to_mask([Polygon(((0.0, 0.0), (far, 1.0), (2.0, 3.0)))], 5, 6)


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


def test_gray_saved_as_rgb_one_bit_and_soft_edges():
    gray = Image.fromarray(MASK.astype(np.uint8) * 255)
    np.testing.assert_array_equal(load_mask(gray.convert("RGB")), MASK)
    np.testing.assert_array_equal(load_mask(gray.convert("1")), MASK)
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


def test_a_color_image_is_no_mask():
    colors = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    with pytest.raises(InvalidMaskError, match="Choose a channel"):
        load_mask(colors)


def test_coco_of_every_kind():
    rle = RLE.from_mask(MASK)
    runs = {"size": [30, 40], "counts": list(rle.counts)}
    for segmentation in (rle.to_coco(), runs, [[8, 5, 33, 5, 33, 20, 8, 20]]):
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
    with pytest.raises(InvalidMaskError, match="2 masks, got 1"):
        encode_masks(codec, [MASK, MASK], ["a"])
    assert encode_masks(codec, [], []) == []


def disc(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return (rows - 0.4 * height) ** 2 + (columns - 0.6 * width) ** 2 < (0.3 * height) ** 2


def test_tight_corners():
    mask = np.zeros((10, 20), bool)
    mask[2:5, 4:10] = True
    assert tight_corners(mask) == (0.2, 0.2, 0.5, 0.5)
    assert pixel_corners((0.2, 0.2, 0.5, 0.5), 10, 20) == (2, 4, 5, 10)


@pytest.mark.parametrize("size", [(30, 50), (200, 150), (900, 1200)])
def test_cut_and_put_back(size: tuple[int, int]):
    mask = disc(*size)
    corners = tight_corners(mask)
    crop = crop_for_codec(mask, corners)
    assert crop.shape == (64, 64) and crop.dtype == np.float32
    assert crop.min() >= 0 and crop.max() <= 1 + 1e-6
    again = paste(crop, corners, *size)
    assert (again & mask).sum() / (again | mask).sum() > 0.97


def test_crop_of_the_same_size_is_the_mask():
    mask = disc(64, 64)
    np.testing.assert_array_equal(crop_for_codec(mask, (0, 0, 1, 1)), mask.astype(np.float32))
    np.testing.assert_array_equal(paste(mask.astype(np.float32), (0, 0, 1, 1), 64, 64), mask)


def test_paste_stays_in_the_box():
    mask = paste(np.ones((64, 64), np.float32), (0.1, 0.2, 0.5, 0.9), 20, 10)
    assert mask[2:10, 2:9].all() and mask.sum() == 8 * 7
    assert not paste(np.ones((64, 64), np.float32), (0.1, 0.2, 0.1, 0.9), 20, 10).any()
    assert not paste(np.ones((64, 64), np.float32), (0.1, 0.2, 0.1004, 0.9), 20, 10).any()


@pytest.mark.parametrize(
    "corners", [(0, 0, 1.1, 1), (-0.1, 0, 1, 1), (1, 0, 0, 1), (0, 0, float("nan"), 1)]
)
def test_corners_out_of_range(corners: tuple[float, ...]):
    for call in (
        lambda: crop_for_codec(disc(9, 9), corners),
        lambda: paste(np.zeros((64, 64), np.float32), corners, 9, 9),
    ):
        with pytest.raises(InvalidMaskError, match="Expected corners"):
            call()


def test_nothing_to_cut():
    mask = np.zeros((10, 10), bool)
    mask[0, 0] = True
    with pytest.raises(InvalidMaskError, match="empty inside the box"):
        crop_for_codec(mask, (0.5, 0.5, 0.5, 0.9))
    with pytest.raises(InvalidMaskError, match="empty inside the box"):
        crop_for_codec(mask, (0.5, 0.5, 1.0, 1.0))
    with pytest.raises(InvalidMaskError, match="is empty"):
        tight_corners(mask & False)
    with pytest.raises(InvalidMaskError, match="Expected a mask"):
        crop_for_codec(mask.astype(np.uint8), (0, 0, 1, 1))
    with pytest.raises(InvalidMaskError, match=r"\[32, 32\]"):
        paste(np.zeros((32, 32)), (0, 0, 1, 1), 9, 9)


def test_each_mask_as_alone(codec: MaskCodec):
    rng = np.random.default_rng(0)
    codes = rng.integers(128, size=(70, 16))
    decoded = codec.decode(codes)
    assert decoded.shape == (70, 64, 64) and decoded.dtype == np.float32
    np.testing.assert_allclose(decoded[66], codec.decode(codes[66:67])[0], atol=1e-5)
    crops = rng.random((5, 64, 64)).astype(np.float32)
    encoded = codec.encode(crops)
    assert encoded.shape == (5, 16) and encoded.dtype == np.int32
    np.testing.assert_array_equal(encoded[3], codec.encode(crops[3:4])[0])


def test_nothing(codec: MaskCodec):
    assert codec.decode(np.zeros((0, 16))).shape == (0, 64, 64)
    assert codec.decode(np.array([])).shape == (0, 64, 64)
    assert codec.encode(np.zeros((0, 64, 64))).shape == (0, 16)


def test_few_programs_for_many_numbers_of_masks(codec: MaskCodec):
    programs = getattr(masks._decode, "_cache_size")  # noqa: B009
    before = programs()
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 13, 64, 65, 130):
        codec.decode(np.zeros((count, 16), np.int32))
    assert programs() - before <= 7  # 1, 2, 4, ... 64


@pytest.mark.parametrize("codes", [np.full((1, 16), 128), np.full((1, 16), -1), np.zeros((2, 15))])
def test_codes_that_do_not_fit(codec: MaskCodec, codes):
    with pytest.raises(InvalidMaskError, match="Expected codes"):
        codec.decode(codes)


def test_crops_that_do_not_fit(codec: MaskCodec):
    with pytest.raises(InvalidMaskError, match="crop_for_codec"):
        codec.encode(np.zeros((1, 32, 32)))
