"""Lists, dicts and what looks like a dataset of Hugging Face; the prompts of tasks."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.readers import Caption, Fields, Ocr, QuestionAnswer
from paligemma_jax.data.record import Record
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.errors import DatasetError

PICTURE = np.zeros((2, 2, 3), np.uint8)
ROW = {"image": PICTURE, "prefix": "caption en", "suffix": "a cat"}


class Dataset:
    """As `datasets.Dataset` is used: columns, a length, and a dict for a number."""

    column_names = ["image", "question", "answers"]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 1:
            raise OSError("image file is truncated")
        picture = Image.new("RGB", (4, 4))
        return {"image": picture, "question": "what is it?", "answers": {"text": ["a", "b"]}}


def test_lists_of_dicts_and_records():
    source = SequenceSource([ROW, Record((PICTURE,), "p", "s", "mine")], name="list")
    assert (source[0].prefix, source[0].suffix, source[0].id) == ("caption en", "a cat", "list:0")
    assert source[0].images[0] is PICTURE and source[-1].id == "mine"


def test_dataset_of_hugging_face():
    source = SequenceSource(Dataset(), QuestionAnswer(answers="answers.text"))
    record = source[0]
    assert record.prefix == "answer en what is it?" and record.answers == ("a", "b")
    with pytest.raises(DatasetError, match="record:1 cannot be read: OSError: image file is trunc"):
        source[1]


def test_prompts_of_tasks():
    row = {"image": {"bytes": b"png", "path": None}, "caption": b"ein Hund", "text": "STOP"}
    record = SequenceSource([row], Caption(language="de"))[0]
    assert (record.prefix, record.suffix, record.images) == ("caption de", "ein Hund", (b"png",))
    assert SequenceSource([row], Ocr())[0].prefix == "ocr"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no records"),
        ({"train": [ROW]}, "Take a split"),
        (iter([ROW]), "not streamed"),
    ],
)
def test_what_is_no_sequence(rows: Any, message: str):
    with pytest.raises(DatasetError, match=message):
        SequenceSource(rows)


@pytest.mark.parametrize(
    ("row", "reader", "message"),
    [
        (3, Fields(), "record:0 is int"),
        ({"image": PICTURE}, Fields(), "record:0: the field 'prefix' is missing; there is image"),
        (ROW | {"image": []}, Fields(), "an empty list"),
        (ROW | {"suffix": b"\xff"}, Fields(), "not UTF-8"),
        (ROW | {"question": " ", "answer": "a"}, QuestionAnswer(), "question: The question is ' '"),
    ],
)
def test_rows_that_are_no_records(row: Any, reader: Any, message: str):
    with pytest.raises(DatasetError, match=message):
        SequenceSource([row], reader)[0]
