"""Run lengths: hand-made ones, and pycocotools where it is installed."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.processing.masks import RLE

MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def test_columns_first_and_outside_first():
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    rle = RLE.from_mask(mask)
    assert rle == RLE(2, 3, (2, 1, 1, 2)) and rle.area == 3
    assert RLE.from_mask(~mask).counts == (0, 2, 1, 1, 2)
    assert rle.to_coco_uncompressed() == {"size": [2, 3], "counts": [2, 1, 1, 2]}


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
    assert RLE.from_coco(rle.to_coco_uncompressed()) == rle
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
    with pytest.raises(InvalidMaskError, match="is no run-length mask"):
        RLE.from_coco(rle)


@pytest.mark.parametrize("counts", [(), (5,), (7,), (7, -1)])
def test_wrong_length(counts: tuple[int, ...]):
    with pytest.raises(InvalidMaskError, match="no mask of 2 x 3"):
        RLE(2, 3, counts)


@pytest.mark.parametrize(
    "mask", [np.zeros((2, 2)), np.zeros((2, 2, 1), bool), np.zeros((0, 3), bool), [[True]]]
)
def test_no_masks(mask):
    with pytest.raises(InvalidMaskError, match="is no mask"):
        RLE.from_mask(mask)
