"""Data in the layouts that training reads: COCO's, Roboflow's, and data sets of tfds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import DatasetError, InvalidImageError
from paligemma_jax.evaluation.examples import MadePicture, open_picture, read_examples
from paligemma_jax.evaluation.tasks import find_benchmark

WIDTH, HEIGHT = 40, 20
BOX = [10.0, 5.0, 20.0, 15.0]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(path)


def coco(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    one = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 5, 10, 10], "iscrowd": 0}
    pictures = [
        {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (7, 8)
    ]
    classes = [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]
    data = {"images": pictures, "annotations": [one], "categories": classes}
    path.write_text(json.dumps(data))


def test_coco(tmp_path: Path):
    coco(tmp_path / "annotations" / "instances_val2017.json")
    picture(tmp_path / "val2017" / "7.png")
    benchmark = find_benchmark("detection")
    first, second = read_examples(benchmark, tmp_path)
    assert first.prompt == "detect cat ; dog" and first.images == (tmp_path / "val2017" / "7.png",)
    np.testing.assert_allclose(first.reference.xyxy, [BOX])
    assert list(first.reference.labels) == ["cat"] and len(second.reference.xyxy) == 0
    file = tmp_path / "annotations" / "instances_val2017.json"
    assert [e.id for e in read_examples(benchmark, file, limit=1)] == [first.id]
    with pytest.raises(DatasetError, match="has no split 'test'. val fits"):
        read_examples(benchmark, tmp_path, split="test")
    with pytest.raises(DatasetError, match="A task of boxes fits"):
        read_examples(find_benchmark("gqa"), tmp_path)


def test_roboflow_boxes(tmp_path: Path):
    coco(tmp_path / "train" / "_annotations.coco.json")
    with pytest.raises(DatasetError, match="train. Name one: --split train"):
        read_examples(find_benchmark("detection"), tmp_path)
    rows = [
        {"image": "7.png", "prefix": "detect cat ; dog",
         "suffix": "<loc0256><loc0256><loc0768><loc0512> cat"},
        {"image": "lost.png", "prefix": "detect cat ; dog", "suffix": ""},
    ]  # fmt: skip
    for split in ("train", "valid", "test"):
        (tmp_path / "dataset").mkdir(exist_ok=True)
        file = tmp_path / "dataset" / f"_annotations.{split}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows if split == "test" else rows[:1])))
    picture(tmp_path / "dataset" / "7.png")
    first, lost = read_examples(find_benchmark("detection"), tmp_path)
    assert first.id == "_annotations.test.jsonl:1" and first.prompt == "detect cat ; dog"
    np.testing.assert_allclose(first.reference.xyxy, [BOX], atol=0.05)
    assert not lost.reference.labels  # its picture will be left out, and named
    assert len(read_examples(find_benchmark("detection"), tmp_path, split="valid")) == 1


def test_prompts_and_answers_of_training(tmp_path: Path):
    rows = [{"image": "7.png", "prefix": "what is it?", "suffix": ["cat", "a cat"]}]
    path = tmp_path / "any.jsonl"
    path.write_text(json.dumps(rows[0]))
    for task, reference in [
        ("gqa", "cat"),
        ("docvqa", ["cat", "a cat"]),
        ("textcaps", ["cat", "a cat"]),
        ("ocr", "cat"),
    ]:
        (one,) = read_examples(find_benchmark(task), path)
        assert (one.id, one.prompt) == ("any.jsonl:1", "what is it?")
        assert one.reference == reference
    with pytest.raises(DatasetError, match="the field 'split' is missing"):
        read_examples(find_benchmark("pope"), path)
    with pytest.raises(DatasetError, match="neither 'mask' nor 'segmentation'"):
        read_examples(find_benchmark("refcoco"), path)


class Prepared:
    """Rows as a prepared data set of tfds gives them."""

    def __init__(self, path: Any, split: str, reader: Any):
        assert split == "validation"
        self.reader = reader

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        if index == 2:
            raise DatasetError("validation:2 cannot be read.")
        pixels = np.full((HEIGHT, WIDTH, 3), index, np.uint8)
        row = {"image": pixels, "question": b"how many?", "answer": np.int64(3)}
        row["captions"] = [b"gr\xc3\xbcn", b"two"]
        return self.reader(row | {"difficulty": "simple"}, f"validation:{index}")


def test_tfds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    for split in ("train", "validation"):
        (tmp_path / f"pets-{split}.array_record-00000-of-00001").touch()
    monkeypatch.setattr("paligemma_jax.evaluation.examples.open_source", Prepared)
    first, second = read_examples(find_benchmark("tallyqa"), tmp_path, limit=2)
    assert (first.id, first.prompt) == ("validation:0", "answer en how many?")
    assert second.reference.group == "simple" and second.reference.reference == 3
    assert first.row["captions"] == ["grün", "two"]
    assert open_picture(second.images[0]).getpixel((0, 0)) == (1, 1, 1)
    with pytest.raises(DatasetError, match="validation:2 cannot be read"):
        read_examples(find_benchmark("tallyqa"), tmp_path)

    def lost() -> Any:
        raise DatasetError("Gone.")

    with pytest.raises(InvalidImageError, match="x: Gone."):
        open_picture(MadePicture("x", lost))
