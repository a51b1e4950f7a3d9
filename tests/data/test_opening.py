"""Every published layout is recognised from its path."""

import json
from pathlib import Path

import pytest

from paligemma_jax.data.coco import CocoDetection
from paligemma_jax.data.sources import JsonlSource, find_splits, open_source
from paligemma_jax.errors import DatasetError

COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 10}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
}
ROW = {"image": "a.png", "prefix": "detect cat", "suffix": ""}


@pytest.fixture(name="lay_out")
def _lay_out(tmp_path: Path, write_lines, write_picture):
    """Writes annotation files and a picture into a directory."""

    def lay_out(*names: str, picture: str = "a.png") -> Path:
        for name in names:
            path = tmp_path / name
            if path.suffix == ".jsonl":
                write_lines(path, [ROW])
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(COCO))
        write_picture(tmp_path / picture)
        return tmp_path

    return lay_out


@pytest.mark.parametrize(
    ("name", "picture", "kind"),
    [
        ("dataset/_annotations.{}.jsonl", "dataset/a.png", JsonlSource),
        ("_annotations.{}.jsonl", "a.png", JsonlSource),
        ("{}/annotations.jsonl", "{}/a.png", JsonlSource),
        ("{}/_annotations.coco.json", "{}/a.png", CocoDetection),
        ("annotations/instances_{}2017.json", "{}2017/a.png", CocoDetection),
        ("annotations/instances_{}2017.json", "images/{}2017/a.png", CocoDetection),
    ],
)
@pytest.mark.parametrize(("asked", "written"), [("train", "train"), ("val", "valid")])
def test_layouts(lay_out, name: str, picture: str, kind: type, asked: str, written: str):
    if kind is CocoDetection and "2017" in name:
        written = asked
    names = [name.format(split) for split in ("train", "test", written)]
    root = lay_out(*names, picture=picture.format(written))
    assert list(find_splits(root)) == list(dict.fromkeys(["train", written, "test"]))
    source = open_source(root, asked)
    assert isinstance(source, kind)
    assert source[0].images == (root / picture.format(written),)


def test_files_and_a_directory_with_one_file(lay_out):
    root = lay_out("mine.jsonl", "other/x.json")
    assert open_source(root)[0].id == open_source(root / "mine.jsonl")[0].id == "mine.jsonl:1"
    assert open_source(root / "other" / "x.json", images=root)[0].images == (root / "a.png",)
    lay_out("more.jsonl")
    assert open_source(root, "more")[0].id == "more.jsonl:1"


def test_unknown_layouts(lay_out):
    root = lay_out("train/annotations.jsonl")
    with pytest.raises(DatasetError, match="no split 'test'. train fits"):
        open_source(root, "test")
    with pytest.raises(DatasetError, match="no data at .*nowhere"):
        open_source(root / "nowhere")
    with pytest.raises(DatasetError, match="neither .jsonl nor .json"):
        open_source(root / "a.png")
    (root / "empty").mkdir()
    with pytest.raises(DatasetError, match="known layout: nothing"):
        open_source(root / "empty")
