"""Results: what they hold, how they are told apart, and what they become."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import ConfigError, InvalidPromptError, MissingExtraError
from paligemma_jax.processing.detections import (
    Detection,
    Detections,
    Segmentation,
    Segmentations,
    intersection_over_union,
)
from paligemma_jax.processing.location_tokens import Box, format_answer, parse_answer
from paligemma_jax.processing.masks import RLE, crop_for_codec

BOXES = (
    Box("cat", 0.0, 0.0, 0.5, 0.5),
    Box("dog", 0.2, 0.5, 0.8, 1.0),
    Box("cat", 0.0, 0.02, 0.5, 0.52),
    Box("cat", 0.0, 0.0, 0.5, 0.5),
)
FOUND = Detections(BOXES, "text", 100, 50, (0.5, 0.75, 0.9, 0.4))
EMPTY = Detections.from_text("I see none", 100, 50)


def test_objects_in_pixels_and_fractions():
    assert FOUND[1] == Detection("dog", (50.0, 10.0, 100.0, 40.0), BOXES[1], 0.75)
    np.testing.assert_allclose(FOUND.xyxy[1], [50, 10, 100, 40])
    np.testing.assert_allclose(FOUND.normalized[1], [0.5, 0.2, 1.0, 0.8])
    assert [found.label for found in FOUND] == FOUND.labels == ["cat", "dog", "cat", "cat"]


def test_parts_are_results_too():
    assert FOUND[-1].score == 0.4 and len(FOUND[1:]) == 3 and len(FOUND[::2]) == 2
    part = FOUND[[3, 1]]
    assert part.labels == ["cat", "dog"] and part.scores == (0.4, 0.75)
    assert part.text == FOUND.text and isinstance(part, Detections)
    assert FOUND[FOUND.xyxy[:, 0] > 1].labels == ["dog", "cat"]
    with pytest.raises(IndexError):
        FOUND[4]


def test_told_apart():
    assert FOUND.filter(0.5).scores == (0.5, 0.75, 0.9)
    assert FOUND.with_labels({"dog"}).labels == ["dog"]
    with pytest.raises(ConfigError, match="with scores"):
        Detections.from_text("", 9, 9).filter(0.5)


def test_duplicates():
    assert FOUND.nms().scores == (0.75, 0.9)
    assert FOUND.nms(iou=1).scores == (0.5, 0.75, 0.9)
    unscored = Detections(BOXES, "", 100, 50)
    assert unscored.nms().boxes == BOXES[:2]
    line = Box("a", 0.1, 0.1, 0.1, 0.9)
    assert len(Detections((line, line), "", 9, 9).nms()) == 1
    for iou in (0, -1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="IoU"):
            FOUND.nms(iou=iou)


def test_overlaps():
    overlaps = intersection_over_union(BOXES[:2], BOXES)
    np.testing.assert_allclose(overlaps[0], [1, 0, 0.48 / 0.52, 1], atol=1e-12)
    assert overlaps.shape == (2, 4) and overlaps[1, 1] == 1


def test_words_and_json():
    assert str(FOUND[:2]) == "cat (0.50): 0 0 50 25\ndog (0.75): 50 10 100 40"
    document = json.loads(json.dumps(FOUND.to_dict()))
    assert document["objects"][1] == {
        "label": "dog", "box": [50.0, 10.0, 100.0, 40.0], "score": 0.75
    }  # fmt: skip
    assert EMPTY.to_dict()["unparsed"] == [
        {"text": "I see none", "start": 0, "reason": "words outside of any object"}
    ]


def test_coco_rows():
    rows = FOUND.to_coco(7, {"dog": 3, "cat": 1})
    assert rows[1] == {
        "image_id": 7, "category_id": 3, "bbox": [50.0, 10.0, 50.0, 30.0], "area": 1500.0,
        "score": 0.75,
    }  # fmt: skip
    assert "score" not in Detections(BOXES, "", 9, 9).to_coco(1, {"dog": 3, "cat": 1})[0]
    with pytest.raises(InvalidPromptError, match=r"\['bird'\], got \['cat', 'dog'\]"):
        FOUND.to_coco(7, {"bird": 1})


def test_nothing_found():
    assert len(EMPTY) == 0 and not list(EMPTY) and str(EMPTY) == "nothing found"
    assert EMPTY.xyxy.shape == (0, 4) and EMPTY.to_coco(1, {}) == [] and not EMPTY[:3]
    assert not EMPTY.nms() and not EMPTY.with_labels(["cat"])
    image = Image.new("RGB", (100, 50))
    assert EMPTY.draw(image).tobytes() == image.tobytes()
    none = Segmentations.decode(parse_answer(""), 100, 50, decode)
    assert none.masks.shape == (0, 50, 100) and none.to_dict()["objects"] == []
    assert not none.nms() and none.draw(image).tobytes() == image.tobytes()


def test_scores_of_another_answer():
    with pytest.raises(ConfigError, match="4 boxes.*1 scores"):
        Detections(BOXES, "", 9, 9, (0.5,))
    with pytest.raises(ConfigError, match="0 boxes.*1 scores"):
        Detections.from_answer(parse_answer(""), 9, 9, [0.5])


def decode(codes: np.ndarray) -> np.ndarray:
    """Stands for the codec: the upper codes/128 of the box."""
    assert codes.dtype == np.int32 and codes.shape[1] == 16
    rows = np.arange(64)[None, :, None] + 0.5
    return (rows < codes[:, :1, None] / 2).astype(np.float32) * np.ones((1, 1, 64), np.float32)


MASKED = (
    Box("cat", 0.0, 0.0, 1.0, 0.5, (64,) * 16),
    Box("dog", 0.2, 0.5, 0.8, 1.0),
    Box("line", 0.5, 0.5, 0.5, 1.0, (127,) * 16),
)
SEGMENTED = Segmentations.decode(
    parse_answer(format_answer(MASKED[:2]) + " ; <loc0512><loc0512><loc0512><loc1023>"
                 + "<seg127>" * 16 + " line"), 100, 50, decode, (0.5, 0.6, 0.7)
)  # fmt: skip


def test_masks_lie_in_their_boxes():
    found = SEGMENTED[0]
    assert isinstance(found, Segmentation) and found.score == 0.5
    assert found.mask[:25, :50].all() and found.mask.sum() == 25 * 50
    assert [polygon.holes for polygon in found.polygons] == [()]
    assert SEGMENTED.masks.shape == (3, 50, 100) and SEGMENTED.masks.dtype == bool
    assert [int(one.mask.sum()) for one in SEGMENTED][1:] == [0, 0]  # no codes; no area


def test_masks_in_json_and_coco():
    document = json.loads(json.dumps(SEGMENTED.to_dict()))
    assert RLE.from_coco(document["objects"][0]["rle"]) == SEGMENTED.rles[0]
    assert document["objects"][0]["polygons"][0]["exterior"][0] == [0, 0]
    assert document["objects"][1]["polygons"] == []
    rows = SEGMENTED.to_coco(1, {"cat": 1, "dog": 2, "line": 3})
    assert [row["area"] for row in rows] == [1250, 0, 0]
    assert rows[0]["segmentation"] == SEGMENTED.rles[0].to_coco() and rows[0]["score"] == 0.5


def test_masks_stay_with_their_boxes():
    part = SEGMENTED[[2, 0]]
    assert part.rles == (SEGMENTED.rles[2], SEGMENTED.rles[0]) and part[1].rle.area == 1250
    assert SEGMENTED.filter(0.6).labels == ["dog", "line"]
    assert isinstance(SEGMENTED.nms(), Segmentations)


def test_masks_of_another_picture():
    with pytest.raises(ConfigError, match="1 masks"):
        Segmentations(MASKED[:1], "", 100, 50, rles=(RLE(4, 4, (16,)),))
    with pytest.raises(ConfigError, match="0 masks"):
        Segmentations(MASKED[:1], "", 100, 50)


def test_mask_to_codes_and_back_keeps_its_place():
    mask = np.zeros((50, 100), bool)
    mask[10:30, 20:60] = True
    corners = (0.2, 0.2, 0.6, 0.6)
    crop = crop_for_codec(mask, corners)
    answer = parse_answer(format_answer([Box("a", *corners, (1,) * 16)]))
    found = Segmentations.decode(answer, 100, 50, lambda codes: crop[None])
    np.testing.assert_array_equal(found.masks[0], mask)


@pytest.mark.parity
def test_supervision():
    sv = pytest.importorskip("supervision")
    theirs = FOUND.to_supervision()
    assert isinstance(theirs, sv.Detections) and theirs.mask is None
    np.testing.assert_array_equal(theirs.xyxy, FOUND.xyxy)
    np.testing.assert_allclose(theirs.confidence, [0.5, 0.75, 0.9, 0.4])
    assert theirs.class_id.tolist() == [0, 1, 0, 0]
    assert theirs.data["class_name"].tolist() == FOUND.labels
    assert FOUND.to_supervision(["dog", "cat"]).class_id.tolist() == [1, 0, 1, 1]
    assert len(theirs[theirs.confidence > 0.6].with_nms(0.5)) == 2
    masked = SEGMENTED.to_supervision()
    np.testing.assert_array_equal(masked.mask, SEGMENTED.masks)
    assert len(EMPTY.to_supervision()) == 0
    with pytest.raises(InvalidPromptError, match="with_labels"):
        FOUND.to_supervision(["dog"])


def test_supervision_is_an_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingExtraError, match=r'pip install "paligemma-jax\[supervision\]"'):
        FOUND.to_supervision()
