"""JSON lines: read as they are written, and every bad line named."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from paligemma_jax.data.readers import Fields
from paligemma_jax.data.record import ImageFolder
from paligemma_jax.data.sources import JsonlSource
from paligemma_jax.errors import DatasetError

ROW = {"image": "a.png", "prefix": "caption en", "suffix": "ein Hündchen"}


def test_records(tmp_path: Path, write_lines):
    several = {"image": ["a.png", "b/c.png"], "prefix": "p", "suffix": ["x", "y"], "id": 7}
    source = JsonlSource(write_lines(tmp_path / "train.jsonl", [ROW, "", several]))
    assert len(source) == 2 and source.blank_lines == (2,)
    first, second = source[0], source[-1]
    assert (first.prefix, first.suffix, first.answers) == ("caption en", "ein Hündchen", ())
    assert first.images == (tmp_path / "a.png",) and first.id == "train.jsonl:1"
    assert second.images == (tmp_path / "a.png", tmp_path / "b" / "c.png")
    assert (second.suffix, second.answers, second.id) == ("x", ("x", "y"), "7")
    assert pickle.loads(pickle.dumps(source))[0] == first
    with pytest.raises(IndexError):
        source[2]


def test_folder_and_names_of_fields(tmp_path: Path, write_lines):
    row = {"file": "a.png", "question": "what?", "answers": "a cat"}
    source = JsonlSource(
        write_lines(tmp_path / "x.jsonl", [row]),
        images=tmp_path / "pictures",
        reader=Fields(image="file", prefix="question", suffix="answers"),
    )
    assert source[0].images == (tmp_path / "pictures" / "a.png",) and source[0].prefix == "what?"


def test_byte_order_mark_and_missing_last_newline(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n" + json.dumps(ROW).encode()
    )
    source = JsonlSource(path)
    assert len(source) == 2 and source[0].suffix == source[1].suffix


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'image': 1}", "x.jsonl:2: the line is no JSON at character 1"),
        (json.dumps(ROW)[:-9], "cut short"),
        ("[1]", "holds a list"),
        ("null", "holds null"),
        ('{"image": "a.png", "image": "b.png"}', "gives image twice"),
        (json.dumps({"image": "a.png", "prefix": "p"}), "field 'suffix' is missing"),
        (json.dumps(ROW | {"suffix": None}), "'suffix' is null"),
        (json.dumps(ROW | {"suffix": 3}), r"'suffix' is '3' \(int\)"),
        (json.dumps(ROW | {"suffix": []}), "'suffix' is an empty list"),
        (json.dumps(ROW | {"image": ""}), "has no name"),
        (json.dumps(ROW | {"image": None}), "'image' is null"),
        (json.dumps(ROW | {"image": "../a.png"}), "leads out of the folder"),
        (json.dumps(ROW | {"image": "/etc/passwd"}), "leads out of the folder"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, write_lines, line: str, message: str):
    source = JsonlSource(write_lines(tmp_path / "x.jsonl", [ROW, line]))
    assert source[0].id == "x.jsonl:1"
    with pytest.raises(DatasetError, match=r"x.jsonl:2: .*" + message.removeprefix("x.jsonl:2: ")):
        source[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no records"),
        (b"\n\n", "has no records"),
        (json.dumps(ROW).encode("utf-16"), "UTF-16"),
    ],
)
def test_files_that_hold_no_records(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        JsonlSource(tmp_path / "x.jsonl")
    with pytest.raises(DatasetError, match="cannot be read: No such file"):
        JsonlSource(tmp_path / "y.jsonl")


def test_links_out_of_the_folder(tmp_path: Path, write_lines, write_picture):
    target = write_picture(tmp_path / "elsewhere" / "a.png")
    lines = write_lines(tmp_path / "data" / "x.jsonl", [ROW])
    (tmp_path / "data" / "a.png").symlink_to(target)
    with pytest.raises(DatasetError, match="leads out of the folder"):
        JsonlSource(lines)[0]
    trusted = JsonlSource(lines, images=ImageFolder(lines.parent, links=True))
    assert trusted[0].images[0].samefile(target)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_file_that_changes_is_noticed(tmp_path: Path, write_lines):
    path = write_lines(tmp_path / "x.jsonl", [ROW, ROW])
    source = JsonlSource(path)
    before = source.fingerprint()
    rows: list[Any] = [ROW | {"suffix": "other"}, ROW]
    write_lines(path, rows)
    with pytest.raises(DatasetError, match="has changed"):
        source[1]
    assert JsonlSource(path).fingerprint() != before
