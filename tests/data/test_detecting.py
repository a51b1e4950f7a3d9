"""Rows with boxes and masks, as data sets of Hugging Face have them."""

from typing import Any

import numpy as np
import pytest

from paligemma_jax.data.readers import Detect, Segment
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.errors import DatasetError
from paligemma_jax.processing.location_tokens import parse_answer
from paligemma_jax.processing.masks import MaskCodec

PICTURE = np.zeros((10, 20, 3), np.uint8)
CAT = "<loc0205><loc0051><loc0614><loc0205> cat"


class Zeros(MaskCodec):
    def encode(self, crops: np.ndarray) -> np.ndarray:
        return np.zeros((len(crops), 16), np.int32)


def row(boxes: Any, labels: Any) -> dict[str, Any]:
    return {"image": PICTURE, "objects": {"bbox": boxes, "category": labels}}


def test_boxes():
    rows = [row([[1, 2, 3, 4]], [0]), row([], []), row([[1, 2, 3, 4]], ["cat"])]
    source = SequenceSource(rows, Detect(("cat", "dog")))
    assert [source[i].suffix for i in range(3)] == [CAT, "", CAT]
    assert source[1].prefix == "detect cat ; dog" and source[0].size == (20, 10)
    present = SequenceSource(rows, Detect())
    assert present[2].prefix == "detect cat"
    corners = SequenceSource([row([[1, 2, 4, 6]], ["cat"])], Detect(box_format="xyxy"))
    assert corners[0].suffix == CAT
    listed = {"image": PICTURE, "objects": [{"bbox": [1, 2, 3, 4], "category": "cat"}]}
    assert SequenceSource([listed], Detect())[0].suffix == CAT


def test_masks():
    mask = np.zeros((10, 20), np.uint8)
    mask[2:6, 1:4] = 1
    things = {"segmentation": [mask, [[1, 2, 4, 2, 4, 6, 1, 6]]], "category": ["cat", "dog"]}
    reader = Segment(Zeros(None), ("cat", "dog"))  # pyright: ignore[reportArgumentType]
    record = SequenceSource([{"image": PICTURE, "objects": things}], reader)[0]
    first, second = parse_answer(record.suffix).objects
    assert record.prefix == "segment cat ; dog" and first.codes == (0,) * 16
    assert (first.y1, first.x1, first.y2, first.x2) == (second.y1, second.x1, second.y2, second.x2)
    things["segmentation"] = [mask * 0, mask]
    with pytest.raises(DatasetError, match=r"'objects.segmentation': masks\[0\].* is empty"):
        SequenceSource([{"image": PICTURE, "objects": things}], reader)[0]


@pytest.mark.parametrize(
    ("boxes", "labels", "classes", "message"),
    [
        ([[1, 2, 3, 4]], [], ("cat",), "has 1 entries and 'objects.category' 0"),
        ([[1, 2, 3, 4]], [5], ("cat",), "holds the number 5, and there are 1 classes"),
        ([[1, 2, 3, 4]], ["dog"], ("cat",), "'dog', which is none of the classes cat"),
        ([[1, 2, 3]], [0], ("cat",), r"the box \[1, 2, 3\] is none"),
        ([[1, 2, 0, 4]], [0], ("cat",), "has no area"),
        ([], [], (), "nothing to ask for"),
        ([[1, 2, 3, 4]], ["a;b"], (), "semicolon"),
    ],
)
def test_rows_that_do_not_fit(boxes: Any, labels: Any, classes: tuple[str, ...], message: str):
    with pytest.raises(DatasetError, match=f"record:0: .*{message}"):
        SequenceSource([row(boxes, labels)], Detect(classes))[0]
