"""Prompts as big_vision's transfers write them, to the space."""

import numpy as np
import pytest

from paligemma_jax.data.readers import (
    Caption,
    Outlined,
    QuestionAnswer,
    ShuffleOptions,
)
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.data.tasks import TaskReader
from paligemma_jax.errors import DatasetError
from paligemma_jax.processing.image import load_image

PICTURE = np.zeros((10, 20, 3), np.uint8)
ROW = {
    "image": PICTURE, "question": "which?", "choices": ["a b", "c, d", "(B) e"], "answer": 1,
    "hint": "", "left": PICTURE, "right": PICTURE, "bbox": np.array([0.25, 0.0, 1.0, 0.5]),
}  # fmt: skip


def test_multiple_choice():
    read = TaskReader("aokvqa_mc")
    record = SequenceSource([ROW], read)[0]
    assert record.prefix == "answer en  which? choose from: a b \t c, d \t (B) e"
    assert record.suffix == "c, d"
    assert SequenceSource([ROW | {"answer": "a b"}], read)[0].suffix == "a b"
    with pytest.raises(DatasetError, match="0 to 2 with 3 choices, got 3"):
        SequenceSource([ROW | {"answer": 3}], read)[0]


def test_science_questions_and_their_options_shuffled():
    record = SequenceSource([ROW | {"choices": ["x", "y", "z"]}], TaskReader("science_qa"))[0]
    options = "Options: (A) x, (B) y, (C) z"
    assert record.prefix == f"Question: which?\nContext: N/A\n{options}\nAnswer:"
    assert record.suffix == "The answer is B."
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(30):
        found = ShuffleOptions()(record, rng)
        letter = found.suffix.removeprefix("The answer is ")[0]
        assert f"({letter}) y" in found.prefix
        seen.add(found.prefix)
    assert len(seen) == 6
    words = SequenceSource([ROW], QuestionAnswer(answers="question"))[0]
    assert ShuffleOptions()(words, rng) == words


def test_an_outlined_widget():
    source = SequenceSource([ROW], Outlined(Caption(text="question"), size=9))
    drawn = np.asarray(load_image(source[0].images[0]))
    red = (drawn == (255, 0, 0)).all(axis=-1)
    expected = np.zeros((9, 9), bool)
    expected[2:9, 0:5] = True
    expected[3:8, 1:4] = False
    np.testing.assert_array_equal(red, expected)
    with pytest.raises(DatasetError, match="record:0: 'bbox' is"):
        SequenceSource([ROW | {"bbox": [0.5, 0, 0.1, 1]}], source.reader)[0]


def test_numbers_as_answers_and_pictures_of_two_columns():
    record = SequenceSource([ROW], QuestionAnswer(("left", "right")))[0]
    assert record.suffix == "1" and len(record.images) == 2
    frames = ROW | {"image": np.zeros((3, 10, 20, 3), np.uint8)}
    assert len(SequenceSource([frames], QuestionAnswer())[0].images) == 3
