"""The check names everything that is wrong, where it is, and draws what is right."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.check import check_data, target_text
from paligemma_jax.data.record import ProblemKind, Record
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.data.transforms import ShuffleBoxes
from paligemma_jax.errors import DatasetError
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.processor import Processor
from tests.data.conftest import CAT, DOG

CODES = "".join(f"<seg{i:03d}>" for i in range(16))


class AllInside(MaskCodec):
    """Masks that fill their boxes."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.ones((len(codes), 64, 64), np.float32)


@pytest.fixture(name="row")
def _row(tmp_path: Path, write_picture):
    """A row whose picture exists; pictures of different numbers differ."""

    def row(number: int = 0, folder: str = "train", **changes) -> dict[str, str]:
        name = f"{number}.png"
        write_picture(tmp_path / folder / name, seed=number)
        return {"image": name, "prefix": "detect cat ; dog", "suffix": CAT} | changes

    return row


def problems(report) -> dict[ProblemKind, list[str]]:
    found: dict[ProblemKind, list[str]] = {}
    for one in report.problems:
        found.setdefault(one.kind, []).append(f"{one.place}: {one.text}")
    return found


def test_good_data(tmp_path: Path, row, write_lines, processor: Processor):
    rows = [row(0), row(1, suffix=f"{DOG} ; {CAT}"), row(2, prefix="caption en", suffix="a cat")]
    write_lines(tmp_path / "train" / "annotations.jsonl", rows)
    sheet = tmp_path / "out" / "sheet.png"
    report = check_data(tmp_path, processor, 128, sheet=sheet)
    assert report.fits and not report.problems
    (split,) = report.splits
    assert (split.records, split.opened, split.labels) == (3, 3, {"cat": 2, "dog": 1})
    lengths = [
        int(np.count_nonzero(processor.encode_train(r["prefix"], r["suffix"], 128)["text"]))
        for r in rows
    ]
    assert split.tokens.tolist() == lengths
    text = str(report)
    assert "train: JsonlSource" in text and "3 records, 3 different pictures opened" in text
    assert "objects: cat 2, dog 1" in text and "All fit length=128." in text
    assert text.endswith(f"targets: {sheet}\nNothing was found wrong.")
    with Image.open(sheet) as drawn:
        assert drawn.format == "PNG" and drawn.width == 3 * 328 + 8


def test_everything_wrong_is_named(tmp_path: Path, row, write_lines, processor: Processor):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    bad = [
        row(0, "."),
        "{'image'",
        "",
        row(1, ".", suffix=None),
        row(2, ".", image="nowhere.png"),
        row(3, ".", image="broken.png"),
        row(4, ".", image="../outside.png"),
        row(5, ".", suffix=""),
        row(6, ".", suffix="<loc0001><loc0002><loc0003> cat"),
        row(7, ".", suffix="<loc0001><loc0002><loc1024><loc0004> cat"),
        row(8, ".", suffix="<loc0500><loc0002><loc0003><loc0004> cat"),
        row(9, ".", suffix=CAT.replace("cat", "hen")),
        row(10, ".", suffix="a cat"),
        row(11, ".", suffix=CAT + " ", prefix="detect cat\n"),
        row(12, ".", prefix="caption en", suffix="very long " * 20),
        row(0, "."),
        row(13, ".", prefix="segment cat"),
        row(14, ".", suffix="<loc0005><loc0002><loc0005><loc0004> cat"),
        row(15, ".", suffix=CAT.replace(" cat", " <seg200> cat")),
    ]
    report = check_data(write_lines(tmp_path / "x.jsonl", bad), processor, 40)
    assert not report.fits
    found = problems(report)
    places = {kind: [text.split(": ")[0] for text in texts] for kind, texts in found.items()}
    unreadable = " ".join(found[ProblemKind.UNREADABLE])
    assert all(f"x.jsonl:{line}: " in unreadable for line in (2, 4, 7))
    assert len(found[ProblemKind.UNREADABLE]) == 3
    assert places[ProblemKind.BLANK] == ["x.jsonl:3"]
    assert places[ProblemKind.PICTURE] == ["x.jsonl:5", "x.jsonl:6"]
    assert "does not exist" in found[ProblemKind.PICTURE][0]
    assert places[ProblemKind.EMPTY] == ["x.jsonl:8"]
    boxes = set(places[ProblemKind.BOX])
    assert boxes == {f"x.jsonl:{line}" for line in (9, 10, 11, 13, 17, 18, 19)}
    assert places[ProblemKind.LABEL] == ["x.jsonl:12"]
    assert set(places[ProblemKind.TEXT]) == {"x.jsonl:14", "x.jsonl:15"}
    assert places[ProblemKind.LONG] == ["x.jsonl:15"]
    assert found[ProblemKind.REPEATED] == ["x.jsonl:16: the same as x.jsonl:1"]
    text = str(report)
    assert "* 3 records that cannot be read" in text and "- 1 empty answers" in text
    assert "1 of 13 do not fit length=40" in text
    assert text.endswith("Training would stop: 6 problems of the kinds marked with *.")
    assert max(map(len, text.splitlines())) < 330


def test_pictures_in_two_splits(tmp_path: Path, row, write_lines):
    write_lines(tmp_path / "train" / "annotations.jsonl", [row(0), row(1)])
    write_lines(tmp_path / "valid" / "annotations.jsonl", [row(2, "valid"), row(1, "valid")])
    report = check_data(tmp_path)
    assert [split.name for split in report.splits] == ["train", "valid"]
    assert problems(report) == {
        ProblemKind.SHARED: [
            "valid/annotations.jsonl:2: its picture is that of train/annotations.jsonl:2"
        ]
    }
    assert report.fits and "All fit with length=" not in str(report)


def test_coco_sizes_and_problems_of_the_source(tmp_path: Path, write_picture):
    write_picture(tmp_path / "a.png", width=20, height=10)
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
    picture = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    masked = f"<loc0100><loc0100><loc0900><loc0900>{CODES} cat"
    records = [
        Record((picture,), "segment cat", masked, "one"),
        Record((picture, picture), "answer en ?", "yes", "two", answers=("yes", "certainly")),
    ]
    codec = AllInside(None)  # pyright: ignore[reportArgumentType]
    plain = check_data(SequenceSource(records), processor, 64)
    report = check_data(
        SequenceSource(records), processor, 64, codec=codec, transforms=[ShuffleBoxes()]
    )
    assert not report.problems and plain.splits[0].tokens[0] == report.splits[0].tokens[0]
    assert plain.sheet is not None and report.sheet is not None
    assert plain.sheet.size == report.sheet.size
    assert np.asarray(plain.sheet).tobytes() != np.asarray(report.sheet).tobytes()
    assert target_text(masked) == "[box] [mask] cat"


def test_only_some_pictures(tmp_path: Path, row, write_lines):
    lines = write_lines(tmp_path / "train" / "x.jsonl", [row(i) for i in range(5)])
    calls = []
    report = check_data(
        lines, most_pictures=2, progress=lambda done, total: calls.append((done, total))
    )
    assert report.splits[0].opened == 2 and calls[-1] == (5, 5)


def test_nothing_to_check(tmp_path: Path):
    with pytest.raises(DatasetError, match="no data at"):
        check_data(tmp_path / "nowhere")
