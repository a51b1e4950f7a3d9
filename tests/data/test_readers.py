"""Readers: examples of any data set become records, with the prompts of the tasks."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.object_readers import CycleObjects, ObjectReader, Outlined, Referring
from paligemma_jax.data.readers import Fields, Reader, ShuffleOptions
from paligemma_jax.data.record import Record
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.data.tasks import PromptReader, TaskReader
from paligemma_jax.errors import ConfigError, DatasetError
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.location_tokens import parse_answer
from tests.data.conftest import PIXELS, FakeCodec

CAT = "<loc0205><loc0051><loc0614><loc0205> cat"
EXAMPLE = {
    "image": PIXELS, "question": "which?", "choices": ["a b", "c, d", "(B) e"], "answer": 1,
    "hint": "", "left": PIXELS, "right": PIXELS, "bbox": np.array([0.25, 0.0, 1.0, 0.5]),
    "caption": b"ein Hund", "text": "STOP",
}  # fmt: skip
VQA = "answer en {question}", "answer"
OCR = PromptReader("ocr", "text")


def read(example: Any, reader: Reader | None = None) -> Record:
    return SequenceSource([example], reader)[0]


def test_prompts_of_tasks():
    record = read(
        EXAMPLE | {"image": {"bytes": b"png", "path": None}}, PromptReader("caption de", "caption")
    )
    assert (record.prefix, record.suffix, record.images) == ("caption de", "ein Hund", (b"png",))
    assert read(EXAMPLE, OCR).prefix == "ocr"
    both = read(EXAMPLE, PromptReader(*VQA, image=("left", "right")))
    assert (both.prefix, both.suffix) == ("answer en which?", "1") and len(both.images) == 2
    frames = EXAMPLE | {"image": np.zeros((3, 10, 20, 3), np.uint8)}
    assert len(read(frames, PromptReader(*VQA)).images) == 3


class Dataset:
    """As `datasets.Dataset` is used: columns, a length, and a dict for a number."""

    column_names = ["image", "question", "answers"]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 1:
            raise OSError("image file is truncated")
        image = Image.new("RGB", (4, 4))
        return {"image": image, "question": "what is it? ", "answers": {"text": ["a", "b"]}}


def test_dataset_of_hugging_face():
    source = SequenceSource(Dataset(), PromptReader("answer en {question}", "answers.text"))
    assert source[0].prefix == "answer en what is it? " and source[0].answers == ("a", "b")
    with pytest.raises(DatasetError, match="record:1 cannot be read: OSError: image file is trunc"):
        source[1]


@pytest.mark.parametrize(
    ("example", "reader", "message"),
    [
        (3, Fields(), "record:0: .* got int"),
        ({"image": PIXELS}, Fields(), "record:0: the field 'prefix' is missing, got image"),
        (EXAMPLE | {"image": []}, PromptReader(), "got an empty list"),
        (EXAMPLE | {"caption": b"\xff"}, PromptReader(), "not UTF-8"),
        (EXAMPLE | {"question": " "}, PromptReader(*VQA), "'question' is empty"),
        (EXAMPLE | {"answer": 3}, TaskReader("aokvqa_mc"), "0 to 2 with 3 choices, got 3"),
        (EXAMPLE | {"bbox": [0.5, 0, 0.1, 1]}, Outlined(OCR, 9), "record:0: 'bbox': .* y1, x1"),
    ],
)
def test_examples_that_are_not_records(example: Any, reader: Reader, message: str):
    with pytest.raises(DatasetError, match=message):
        read(example, reader)


def test_multiple_choice_as_big_vision_writes_it():
    reader = TaskReader("aokvqa_mc")
    record = read(EXAMPLE, reader)
    assert record.prefix == "answer en  which? choose from: a b \t c, d \t (B) e"
    assert record.suffix == "c, d"
    assert read(EXAMPLE | {"answer": "a b"}, reader).suffix == "a b"


def test_science_questions_and_their_options_shuffled():
    record = read(EXAMPLE | {"choices": ["x", "y", "z"]}, TaskReader("science_qa"))
    options = "Options: (A) x, (B) y, (C) z"
    assert record.prefix == f"Question: which?\nContext: N/A\n{options}\nAnswer:"
    assert record.suffix == "The answer is B."
    rng = np.random.default_rng(0)
    prompts = set()
    for _ in range(30):
        found = ShuffleOptions()(record, rng)
        letter = found.suffix.removeprefix("The answer is ")[0]
        assert f"({letter}) y" in found.prefix
        prompts.add(found.prefix)
    assert len(prompts) == 6
    words = read(EXAMPLE, OCR)
    assert ShuffleOptions()(words, rng) == words


def test_an_outlined_widget():
    record = read(EXAMPLE, Outlined(OCR, size=9))
    red = (np.asarray(load_image(record.images[0])) == (255, 0, 0)).all(axis=-1)
    expected = np.zeros((9, 9), bool)
    expected[2:9, 0:5] = True
    expected[3:8, 1:4] = False
    np.testing.assert_array_equal(red, expected)


def boxes(values: Any, labels: Any) -> dict[str, Any]:
    return {"image": PIXELS, "objects": {"bbox": values, "category": labels}}


def test_boxes():
    reader = ObjectReader(classes=("cat", "dog"))
    record = read(boxes([[1, 2, 3, 4]], [0]), reader)
    assert (record.prefix, record.suffix, record.size) == ("detect cat ; dog", CAT, (20, 10))
    assert read(boxes([[1, 2, 3, 4]], ["cat"]), reader).suffix == CAT
    assert read(boxes([], []), reader).suffix == ""
    assert read(boxes([[1, 2, 3, 4]], ["cat"]), ObjectReader()).prefix == "detect cat"
    listed = {"image": PIXELS, "objects": [{"bbox": [1, 2, 3, 4], "category": "cat"}]}
    assert read(listed, ObjectReader()).suffix == CAT


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        ("xyxy", [1, 2, 4, 6]),
        ("yxyx", [2, 1, 6, 4]),
        ("rel_yxyx", [0.2, 0.05, 0.6, 0.2]),
        ("rel_xywh", [0.05, 0.2, 0.15, 0.4]),
    ],
)
def test_formats_of_boxes(box_format: str, box: list[float]):
    assert read(boxes([box], ["cat"]), ObjectReader(box_format=box_format)).suffix == CAT
    with pytest.raises(ConfigError, match="box_format must be .* got 'cxcywh'"):
        read(boxes([box], ["cat"]), ObjectReader(box_format="cxcywh"))


@pytest.mark.parametrize(
    ("values", "labels", "classes", "message"),
    [
        ([[1, 2, 3, 4]], [], ("cat",), "has 1 entries and 'objects.category' 0"),
        ([[1, 2, 3, 4]], [5], ("cat",), "holds the number 5, and there are 1 classes"),
        ([[1, 2, 3, 4]], ["dog"], ("cat",), "one of cat, got 'dog'"),
        ([[1, 2, 3]], [0], ("cat",), r"four numbers, got \[1, 2, 3\]"),
        ([[1, 2, 0, 4]], [0], ("cat",), "has no area"),
        ([], [], (), "nothing to ask for"),
        ([[1, 2, 3, 4]], ["a;b"], (), "semicolon"),
    ],
)
def test_malformed_boxes(values: Any, labels: Any, classes: tuple[str, ...], message: str):
    with pytest.raises(DatasetError, match=f"record:0: .*{message}"):
        read(boxes(values, labels), ObjectReader(classes=classes))


def test_masks():
    mask = np.zeros((10, 20), np.uint8)
    mask[2:6, 1:4] = 1
    things = {"segmentation": [mask, [[1, 2, 4, 2, 4, 6, 1, 6]]], "category": ["cat", "dog"]}
    reader = ObjectReader(classes=("cat", "dog"), codec=FakeCodec())
    record = read({"image": PIXELS, "objects": things}, reader)
    first, second = parse_answer(record.suffix).objects
    assert record.prefix == "segment cat ; dog" and first.codes == (7,) * 16
    assert (first.y1, first.x1, first.y2, first.x2) == (second.y1, second.x1, second.y2, second.x2)
    things["segmentation"] = [mask * 0, mask]
    with pytest.raises(DatasetError, match=r"'objects.segmentation': masks\[0\].* empty"):
        read({"image": PIXELS, "objects": things}, reader)


def referred(*expressions: list[str]) -> dict[str, Any]:
    mask = np.zeros((20, 30, 3), np.uint8)
    mask[5:15, 3:12] = 255
    return {
        "image": np.zeros((20, 30, 3), np.uint8),
        "objects": {
            "mask": [mask] * len(expressions),
            "bbox": [[0.25, 0.1 * n, 0.75, 0.4] for n in range(len(expressions))],
            "refs": {"sentence": list(expressions)},
        },
    }


def test_every_referred_object_comes_before_any_comes_again():
    codec = FakeCodec()
    reader = Referring(codec=codec)
    records = [read(referred(["a"], ["b", "c"], ["d"]), reader) for _ in range(2)]
    assert codec.counts == [3]  # pyright: ignore[reportAttributeAccessIssue]  # then from the cache
    rng = np.random.default_rng(0)
    rounds = [CycleObjects()(dataclasses.replace(records[1], epoch=n), rng) for n in range(30)]
    for start in range(0, 30, 3):
        assert len({one.suffix for one in rounds[start : start + 3]}) == 3
    assert {one.prefix for one in rounds} == {"a", "b", "c", "d"}
    assert rounds[0].suffix.startswith("<loc0256>") and rounds[0].suffix.count("<seg") == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": []}, "0 masks, 1 boxes and 1 lists"),
        ({"bbox": [[0.5, 0, 0.1, 1]]}, "y1, x1, y2, x2 from 0 to 1"),
        ({"bbox": [[0.9, 0.9, 1, 1]]}, "empty inside the box"),
        ({"mask": [b"no image"]}, "PNG"),
        ({"mask": [], "bbox": [], "refs": {"sentence": []}}, "0 masks"),
    ],
)
def test_malformed_referred_objects(change: dict[str, Any], message: str):
    example = referred(["a"])
    example["objects"] |= change
    with pytest.raises(DatasetError, match=message):
        read(example, Referring(codec=FakeCodec()))
    with pytest.raises(DatasetError, match="need a mask codec"):
        read(referred(["a"]), Referring())
