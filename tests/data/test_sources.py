"""Sources: JSON lines with every bad line named, sequences, and the layout of a path."""

import json
import pickle
import shlex
from pathlib import Path
from typing import Any

import pytest

from paligemma_jax.data.coco import CocoSource, read_coco
from paligemma_jax.data.object_readers import Referring
from paligemma_jax.data.readers import Fields
from paligemma_jax.data.record import ImageFolder, Record
from paligemma_jax.data.sources import JsonlSource, SequenceSource, find_splits, open_source
from paligemma_jax.errors import DatasetError
from tests.data.conftest import PIXELS, FakeCodec

LINE = {"image": "a.png", "prefix": "caption en", "suffix": "ein Hündchen"}
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 10}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
}


def test_records_of_lines(tmp_path: Path, write_lines):
    several = {"image": ["a.png", "b/c.png"], "prefix": "p", "suffix": ["x", "y"], "id": 7}
    source = JsonlSource(write_lines(tmp_path / "train.jsonl", [LINE, "", several]))
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
    line = {"file": "a.png", "question": "what?", "answers": "a cat"}
    source = JsonlSource(
        write_lines(tmp_path / "x.jsonl", [line]),
        images=tmp_path / "images",
        reader=Fields(image="file", prefix="question", suffix="answers"),
    )
    assert source[0].images == (tmp_path / "images" / "a.png",) and source[0].prefix == "what?"


def test_byte_order_mark_and_missing_last_newline(tmp_path: Path):
    path, line = tmp_path / "x.jsonl", json.dumps(LINE).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line)
    source = JsonlSource(path)
    assert len(source) == 2 and source[0].suffix == source[1].suffix


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'image': 1}", "the line is not JSON at character 1"),
        (json.dumps(LINE)[:-9], "cut short"),
        ("[1]", r"got \[1\]"),
        ("null", "got null"),
        ('{"image": "a.png", "image": "b.png"}', "gives image twice"),
        (json.dumps({"image": "a.png", "prefix": "p"}), "field 'suffix' is missing"),
        (json.dumps(LINE | {"suffix": None}), "'suffix': .* null"),
        (json.dumps(LINE | {"suffix": 3}), r"'suffix': .*'3' \(int\)"),
        (json.dumps(LINE | {"suffix": []}), "'suffix': .*empty list"),
        (json.dumps(LINE | {"image": ""}), "got ''"),
        (json.dumps(LINE | {"image": None}), "'image': .*null"),
        (json.dumps(LINE | {"image": "../a.png"}), "outside of the folder"),
        (json.dumps(LINE | {"image": "/etc/passwd"}), "outside of the folder"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, write_lines, line: str, message: str):
    source = JsonlSource(write_lines(tmp_path / "x.jsonl", [LINE, line]))
    assert source[0].id == "x.jsonl:1"
    with pytest.raises(DatasetError, match=r"x.jsonl:2: .*" + message):
        source[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no records"), (b"\n\n", "no records"), (json.dumps(LINE).encode("utf-16"), "UTF-16")],
)
def test_files_without_records(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        JsonlSource(tmp_path / "x.jsonl")
    with pytest.raises(DatasetError, match="cannot be read: No such file"):
        JsonlSource(tmp_path / "y.jsonl")


def test_links_out_of_the_folder(tmp_path: Path, write_lines, write_image):
    target = write_image(tmp_path / "elsewhere" / "a.png")
    lines = write_lines(tmp_path / "data" / "x.jsonl", [LINE])
    (tmp_path / "data" / "a.png").symlink_to(target)
    with pytest.raises(DatasetError, match="outside of the folder"):
        JsonlSource(lines)[0]
    trusted = JsonlSource(lines, images=ImageFolder(lines.parent, links=True))
    assert trusted[0].images[0].samefile(target)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_file_that_changes_is_noticed(tmp_path: Path, write_lines):
    path = write_lines(tmp_path / "x.jsonl", [LINE, LINE])
    source = JsonlSource(path)
    before = source.fingerprint()
    write_lines(path, [LINE | {"suffix": "other"}, LINE])
    with pytest.raises(DatasetError, match="has changed"):
        source[1]
    assert JsonlSource(path).fingerprint() != before


def test_sequences_of_dicts_and_records():
    example = {"image": PIXELS, "prefix": "caption en", "suffix": "a cat"}
    source = SequenceSource([example, Record((PIXELS,), "p", "s", "mine")], name="list")
    assert (source[0].prefix, source[0].suffix, source[0].id) == ("caption en", "a cat", "list:0")
    assert source[0].images[0] is PIXELS and source[-1].id == "mine"


@pytest.mark.parametrize(
    ("examples", "message"),
    [([], "no records"), ({"train": [LINE]}, "Take a split"), (iter([LINE]), "not streamed")],
)
def test_what_is_not_a_sequence(examples: Any, message: str):
    with pytest.raises(DatasetError, match=message):
        SequenceSource(examples)


@pytest.fixture(name="lay_out")
def _lay_out(tmp_path: Path, write_lines, write_image):
    """Writes annotation files and an image into a directory."""

    def lay_out(*names: str, image: str = "a.png") -> Path:
        for name in names:
            path = tmp_path / name
            if path.suffix == ".jsonl":
                write_lines(path, [LINE])
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(COCO))
        write_image(tmp_path / image)
        return tmp_path

    return lay_out


@pytest.mark.parametrize(
    ("name", "image", "kind"),
    [
        ("dataset/_annotations.{}.jsonl", "dataset/a.png", JsonlSource),
        ("_annotations.{}.jsonl", "a.png", JsonlSource),
        ("{}/annotations.jsonl", "{}/a.png", JsonlSource),
        ("{}/_annotations.coco.json", "{}/a.png", CocoSource),
        ("annotations/instances_{}2017.json", "{}2017/a.png", CocoSource),
        ("annotations/instances_{}2017.json", "images/{}2017/a.png", CocoSource),
    ],
)
@pytest.mark.parametrize(("asked", "written"), [("train", "train"), ("val", "valid")])
def test_layouts(lay_out, name: str, image: str, kind: type, asked: str, written: str):
    if "2017" in name:
        written = asked
    names = [name.format(split) for split in ("train", "test", written)]
    root = lay_out(*names, image=image.format(written))
    assert list(find_splits(root)) == list(dict.fromkeys(["train", written, "test"]))
    source = open_source(root, asked)
    assert isinstance(source, kind)
    assert source[0].images == (root / image.format(written),)


def test_files_and_a_directory_with_one_file(lay_out):
    root = lay_out("mine.jsonl", "other/x.json")
    assert open_source(root)[0].id == open_source(root / "mine.jsonl")[0].id == "mine.jsonl:1"
    assert open_source(root / "other" / "x.json", images=root)[0].images == (root / "a.png",)
    lay_out("more.jsonl")
    assert open_source(root, "more")[0].id == "more.jsonl:1"


def test_unknown_layouts(lay_out):
    root = lay_out("train/annotations.jsonl")
    with pytest.raises(DatasetError, match="no split 'test', only train"):
        open_source(root, "test")
    with pytest.raises(DatasetError, match="no data at .*nowhere"):
        open_source(root / "nowhere")
    with pytest.raises(DatasetError, match="neither .jsonl nor .json"):
        open_source(root / "a.png")
    (root / "empty").mkdir()
    with pytest.raises(DatasetError, match="known layout, but nothing"):
        open_source(root / "empty")


def test_prepared_data_with_a_dash_in_its_split_and_a_codec_for_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("dataset_info.json", "vqa-test-dev.array_record-00000-of-00001"):
        (tmp_path / name).touch()
    assert list(find_splits(tmp_path)) == ["test-dev"]
    monkeypatch.setattr("paligemma_jax.data.sources.TfdsSource", lambda *given: given)
    codec = FakeCodec()
    opened: Any = open_source(tmp_path, reader=Referring(), codec=codec)
    assert opened[1] == "train" and opened[2].codec is codec


@pytest.mark.parametrize("open_at", [open_source, read_coco, JsonlSource])
def test_suggested_commands_quote_paths(open_at, tmp_path: Path):
    missing = tmp_path / "it's $HOME" / "train.json"
    with pytest.raises(DatasetError) as caught:
        open_at(missing)
    assert shlex.split(str(caught.value).partition("Look with: ")[2])[-1] == str(missing.parent)
