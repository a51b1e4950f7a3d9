"""Changes to records: what they change, what they keep, and what they refuse."""

import collections
import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.record import Record
from paligemma_jax.data.transforms import (
    CycleAnswers,
    InceptionCrop,
    LowerCase,
    MostFrequentAnswer,
    RandomAnswer,
    RandomCrop,
    SampleClasses,
    ShuffleBoxes,
)
from paligemma_jax.errors import ConfigError, DatasetError
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.location_tokens import parse_answer
from tests.data.conftest import CAT, CODES, DOG

PETS = Record((), "detect cat ; dog ; cow", f"{CAT} ; {DOG}", "pets")
ASKED = Record((), "answer en ?", "a", "asked", answers=("a", "b", "b", "c"))


@pytest.fixture(name="rng")
def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def labels(text: str) -> list[str]:
    return [thing.label for thing in parse_answer(text).objects]


def picture(width: int = 90, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (height // 6, width // 6, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def test_choice_of_an_answer(rng: np.random.Generator):
    found = collections.Counter(RandomAnswer()(ASKED, rng).suffix for _ in range(400))
    assert set(found) == {"a", "b", "c"} and 150 < found["b"] < 250
    assert MostFrequentAnswer()(ASKED, rng).suffix == "b"
    for transform in (RandomAnswer(), MostFrequentAnswer(), CycleAnswers()):
        assert transform(ASKED, rng).answers == ()
        alone = dataclasses.replace(ASKED, answers=())
        assert transform(alone, rng) == alone


def test_each_answer_comes_once_in_as_many_epochs(rng: np.random.Generator):
    transform = CycleAnswers(seed=3)
    epochs = [dataclasses.replace(ASKED, epoch=epoch) for epoch in range(8)]
    found = [transform(record, rng).suffix for record in epochs]
    assert sorted(found[:4]) == sorted(found[4:]) == ["a", "b", "b", "c"]
    others = [transform(dataclasses.replace(record, id="x"), rng).suffix for record in epochs]
    assert found != others


def test_lower_case(rng: np.random.Generator):
    record = Record((), "Answer EN ?", "Yes <loc0001>", "x", answers=("Yes <loc0001>", "NO"))
    found = LowerCase()(record, rng)
    assert (found.prefix, found.suffix) == ("answer en ?", "yes <loc0001>")
    assert found.answers == ("yes <loc0001>", "no")
    assert LowerCase(prefix=False)(record, rng).prefix == "Answer EN ?"


def test_shuffled_boxes(rng: np.random.Generator):
    found = [ShuffleBoxes()(PETS, rng) for _ in range(20)]
    assert {record.suffix for record in found} == {f"{CAT} ; {DOG}", f"{DOG} ; {CAT}"}
    assert {record.prefix for record in found} == {PETS.prefix}
    asked = {ShuffleBoxes(shuffle_labels=True)(PETS, rng).prefix for _ in range(60)}
    assert len(asked) == 6
    words = Record((), "caption en", "a cat", "x")
    assert ShuffleBoxes()(words, rng) == words


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("<loc0001><loc0002> cat", "pets: .*'<loc0001><loc0002> cat'"),
        (f"{CAT} ; <loc0001><loc0001><loc0001><loc0500> dog", "pets: .*corners"),
    ],
)
def test_nothing_is_lost_in_silence(rng: np.random.Generator, suffix: str, message: str):
    record = dataclasses.replace(PETS, suffix=suffix)
    with pytest.raises(DatasetError, match=message):
        ShuffleBoxes()(record, rng)


def test_classes_asked_for(rng: np.random.Generator):
    known = ("cat", "dog", "cow", "hen", "pig")
    for _ in range(40):
        found = SampleClasses(known, max_present=1, max_negatives=2)(PETS, rng)
        asked = found.prefix.removeprefix("detect ").split(" ; ")
        (kept,) = labels(found.suffix)
        assert kept in asked and kept in ("cat", "dog") and 1 <= len(asked) <= 3
        assert {"cat", "dog"} & set(asked) == {kept}
    everything = SampleClasses()(PETS, rng)
    assert sorted(everything.prefix.split(" ")) == sorted("detect cat ; dog".split(" "))
    nothing = SampleClasses(known)(dataclasses.replace(PETS, suffix=""), rng)
    assert nothing.prefix.removeprefix("detect ") in known and nothing.suffix == ""
    with pytest.raises(DatasetError, match="got dog"):
        SampleClasses(("cat",))(PETS, rng)


@pytest.mark.parametrize("transform", [RandomCrop(), InceptionCrop(), InceptionCrop(min_area=0.2)])
def test_boxes_go_with_the_crop(rng: np.random.Generator, transform):
    # One object, drawn: its box must be around it afterwards.
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[12:36, 27:72] = 255
    suffix = "<loc0205><loc0307><loc0614><loc0818> box"
    record = Record((pixels,), "detect box", suffix, "x", size=(90, 60))
    sizes = set()
    for _ in range(30):
        found = transform(record, rng)
        shown = load_image(found.images[0])
        sizes.add(shown.size)
        assert found.size == shown.size
        inside = np.asarray(shown)[..., 0] > 0
        for thing in parse_answer(found.suffix).objects:
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            drawn = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
            scale = [shown.height, shown.width] * 2
            corners = [thing.y1, thing.x1, thing.y2, thing.x2]
            np.testing.assert_allclose(np.multiply(corners, scale), drawn, atol=0.2)
        if not found.suffix:
            assert inside.sum() < 0.31 * 24 * 45
    assert len(sizes) > 1 or isinstance(transform, RandomCrop)


def test_crops_spare_masks_and_words(rng: np.random.Generator):
    mask = f"<loc0000><loc0000><loc1023><loc1023>{CODES} cat"
    record = Record((picture(),), "segment cat", mask, "x")
    assert InceptionCrop()(record, rng).suffix == mask  # every crop would cut it
    small = f"<loc0500><loc0500><loc0530><loc0530>{CODES} cat"
    found = InceptionCrop(max_ratio=1.0)(dataclasses.replace(record, suffix=small), rng)
    (thing,) = parse_answer(found.suffix).objects
    assert thing.codes == tuple(range(16)) and found.suffix != small
    words = dataclasses.replace(record, suffix="a cat")
    cut = RandomCrop()(words, rng)
    assert cut.suffix == "a cat" and load_image(cut.images[0]).size == (52, 52)


def test_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match="scale .* got 0"):
        RandomCrop(scale=0)
    with pytest.raises(ConfigError, match="min_area .* got 1.5"):
        InceptionCrop(min_area=1.5)
    with pytest.raises(ConfigError, match="max_ratio .* got 0.5"):
        InceptionCrop(max_ratio=0.5)


def test_settings_are_picklable_and_comparable():
    for one in (InceptionCrop(), SampleClasses(("a",))):
        assert pickle.loads(pickle.dumps(one)) == one
