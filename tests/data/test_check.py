"""The check names everything that is wrong, where it is, and draws what is right."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.check import check_data
from paligemma_jax.data.record import ProblemKind, Record
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.data.transforms import ShuffleBoxes
from paligemma_jax.errors import DatasetError
from paligemma_jax.processing.processor import Processor
from tests.data.conftest import CAT, CODES, DOG, FakeCodec


@pytest.fixture(name="line")
def _line(tmp_path: Path, write_image):
    """A row whose image exists; images of different numbers differ."""

    def line(number: int = 0, folder: str = "train", **changes) -> dict[str, str]:
        name = f"{number}.png"
        write_image(tmp_path / folder / name, seed=number)
        return {"image": name, "prefix": "detect cat ; dog", "suffix": CAT} | changes

    return line


def problems(report) -> dict[ProblemKind, list[str]]:
    found: dict[ProblemKind, list[str]] = {}
    for one in report.problems:
        found.setdefault(one.kind, []).append(f"{one.where}: {one.text}")
    return found


def test_good_data(tmp_path: Path, line, write_lines, processor: Processor):
    rows = [line(0), line(1, suffix=f"{DOG} ; {CAT}"), line(2, prefix="caption en", suffix="a cat")]
    write_lines(tmp_path / "train" / "annotations.jsonl", rows)
    sheet = tmp_path / "out" / "sheet.png"
    calls = []
    report = check_data(
        tmp_path, processor, 128, sheet=sheet, progress=lambda *done: calls.append(done)
    )
    assert calls[-1] == (3, 3)
    assert report.ok and not report.problems
    (split,) = report.splits
    assert (split.records, split.images, split.labels) == (3, 3, {"cat": 2, "dog": 1})
    lengths = [
        int(np.count_nonzero(processor.encode_train(r["prefix"], r["suffix"], 128)["text"]))
        for r in rows
    ]
    assert split.tokens.tolist() == lengths
    text = str(report)
    assert "train: JsonlSource" in text and "3 records, 3 different images opened" in text
    assert "objects: cat 2, dog 1" in text and "None is longer than length=128." in text
    assert text.endswith(f"targets: {sheet}\nNo problems found.")
    with Image.open(sheet) as drawn:
        assert drawn.format == "PNG" and drawn.width == 3 * 328 + 8


def test_everything_wrong_is_named(tmp_path: Path, line, write_lines, processor: Processor):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    bad = [
        line(0, "."),
        "{'image'",
        "",
        line(1, ".", suffix=None),
        line(2, ".", image="nowhere.png"),
        line(3, ".", image="broken.png"),
        line(4, ".", image="../outside.png"),
        line(5, ".", suffix=""),
        line(6, ".", suffix="<loc0001><loc0002><loc0003> cat"),
        line(7, ".", suffix="<loc0001><loc0002><loc1024><loc0004> cat"),
        line(8, ".", suffix="<loc0500><loc0002><loc0003><loc0004> cat"),
        line(9, ".", suffix=CAT.replace("cat", "hen")),
        line(10, ".", suffix="a cat"),
        line(11, ".", suffix=CAT + " ", prefix="detect cat\n"),
        line(12, ".", prefix="caption en", suffix="very long " * 20),
        line(0, "."),
        line(13, ".", prefix="segment cat"),
        line(14, ".", suffix="<loc0005><loc0002><loc0005><loc0004> cat"),
        line(15, ".", suffix=CAT.replace(" cat", " <seg200> cat")),
    ]
    report = check_data(write_lines(tmp_path / "x.jsonl", bad), processor, 40)
    assert not report.ok
    found = problems(report)
    places = {kind: [text.split(": ")[0] for text in texts] for kind, texts in found.items()}
    unreadable = " ".join(found[ProblemKind.UNREADABLE])
    assert all(f"x.jsonl:{line}: " in unreadable for line in (2, 4, 7))
    assert len(found[ProblemKind.UNREADABLE]) == 3
    assert places[ProblemKind.BLANK] == ["x.jsonl:3"]
    assert places[ProblemKind.IMAGE] == ["x.jsonl:5", "x.jsonl:6"]
    assert "does not exist" in found[ProblemKind.IMAGE][0]
    assert places[ProblemKind.EMPTY] == ["x.jsonl:8"]
    boxes = set(places[ProblemKind.BOX])
    assert boxes == {f"x.jsonl:{line}" for line in (9, 10, 11, 13, 17, 18, 19)}
    assert places[ProblemKind.LABEL] == ["x.jsonl:12"]
    assert set(places[ProblemKind.WHITESPACE]) == {"x.jsonl:14", "x.jsonl:15"}
    assert places[ProblemKind.TOO_LONG] == ["x.jsonl:15"]
    assert found[ProblemKind.DUPLICATE] == ["x.jsonl:16: the same as x.jsonl:1"]
    text = str(report)
    assert "* 3 records that cannot be read" in text and "- 1 empty answers" in text
    assert "1 of 13 are longer than length=40" in text
    assert text.endswith("Training would stop: 6 problems of the kinds marked with *.")
    assert max(map(len, text.splitlines())) < 330


def test_images_in_two_splits(tmp_path: Path, line, write_lines):
    write_lines(tmp_path / "train" / "annotations.jsonl", [line(0), line(1)])
    write_lines(tmp_path / "valid" / "annotations.jsonl", [line(2, "valid"), line(1, "valid")])
    report = check_data(tmp_path)
    assert [split.name for split in report.splits] == ["train", "valid"]
    assert problems(report) == {
        ProblemKind.SHARED: [
            "valid/annotations.jsonl:2: its image is that of train/annotations.jsonl:2"
        ]
    }
    assert report.ok and "longer than length=" not in str(report)


def test_coco_sizes_and_problems_of_the_source(tmp_path: Path, write_image):
    write_image(tmp_path / "a.png", width=20, height=10)
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 10, "height": 20}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 1, "bbox": [8, 0, 8, 8]}],
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    found = problems(check_data(path))
    assert found[ProblemKind.SIZE] == ["x.json:image 1: it is 20 x 10, and the data says 10 x 20"]
    assert found[ProblemKind.BOX][0].startswith("x.json:annotation 5: the box")


def test_records_of_any_kind_and_transforms(processor: Processor):
    image = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    masked = f"<loc0100><loc0100><loc0900><loc0900>{CODES} cat"
    records = [
        Record((image,), "segment cat", masked, "one"),
        Record((image, image), "answer en ?", "yes", "two", answers=("yes", "certainly")),
    ]
    codec = FakeCodec()
    plain = check_data(SequenceSource(records), processor, 64)
    report = check_data(
        SequenceSource(records), processor, 64, codec=codec, transforms=[ShuffleBoxes()]
    )
    assert not report.problems and plain.splits[0].tokens[0] == report.splits[0].tokens[0]
    assert plain.sheet is not None and report.sheet is not None
    assert plain.sheet.size == report.sheet.size
    assert np.asarray(plain.sheet).tobytes() != np.asarray(report.sheet).tobytes()


def test_nothing_to_check(tmp_path: Path):
    with pytest.raises(DatasetError, match="no data at"):
        check_data(tmp_path / "nowhere")
