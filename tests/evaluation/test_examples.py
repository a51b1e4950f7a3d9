"""Examples of tasks: JSON lines, COCO's and Roboflow's layouts, rows of the public builders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import ConfigError, DatasetError, InvalidImageError
from paligemma_jax.evaluation.examples import LazyImage, open_image, read_examples
from paligemma_jax.evaluation.tasks import TASKS, find_task
from tests.data.builders import BUILT, Built
from tests.data.test_builders import prepared

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
    benchmark = find_task("detection")
    first, second = read_examples(benchmark, tmp_path)
    assert first.prompt == "detect cat ; dog" and first.images == (tmp_path / "val2017" / "7.png",)
    np.testing.assert_allclose(first.reference.xyxy, [BOX])
    assert list(first.reference.labels) == ["cat"] and len(second.reference.xyxy) == 0
    file = tmp_path / "annotations" / "instances_val2017.json"
    assert [e.id for e in read_examples(benchmark, file, limit=1)] == [first.id]
    with pytest.raises(DatasetError, match="has no split 'test'. Its splits: val"):
        read_examples(benchmark, tmp_path, split="test")
    with pytest.raises(DatasetError, match="holds COCO's boxes"):
        read_examples(find_task("gqa"), tmp_path)


def test_roboflow_boxes(tmp_path: Path):
    coco(tmp_path / "train" / "_annotations.coco.json")
    with pytest.raises(DatasetError, match="Name one: --split train"):
        read_examples(find_task("detection"), tmp_path)
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
    first, lost = read_examples(find_task("detection"), tmp_path)
    assert first.id == "_annotations.test.jsonl:1" and first.prompt == "detect cat ; dog"
    np.testing.assert_allclose(first.reference.xyxy, [BOX], atol=0.05)
    assert not lost.reference.labels  # its picture will be left out, and named
    assert len(read_examples(find_task("detection"), tmp_path, split="valid")) == 1


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
        (one,) = read_examples(find_task(task), path)
        assert (one.id, one.prompt) == ("any.jsonl:1", "what is it?")
        assert one.reference == reference
    with pytest.raises(DatasetError, match="the split is missing"):
        read_examples(find_task("pope"), path)
    with pytest.raises(DatasetError, match="expected a 'mask'"):
        read_examples(find_task("refcoco_seg"), path)


def test_tfds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = {"question": b"how many?", "answer": np.int64(3), "difficulty": "simple"}
    row |= {"captions": [b"gr\xc3\xbcn", b"two"]}
    rows = [row | {"image": np.full((HEIGHT, WIDTH, 3), n, np.uint8)} for n in (0, 1)]
    folder = give([*rows, {}], tmp_path, monkeypatch)
    first, second = read_examples(find_task("tallyqa"), folder, split="test_de", limit=2)
    assert (first.id, first.prompt) == ("test_de:0", "answer en how many?")
    assert second.groups == ("simple",) and second.reference == "3"
    assert first.fields["captions"] == ["grün", "two"]
    assert open_image(second.images[0]).getpixel((0, 0)) == (1, 1, 1)
    with pytest.raises(DatasetError, match="'image' is missing"):
        read_examples(find_task("tallyqa"), folder, split="test_de")

    def lost() -> Any:
        raise DatasetError("Gone.")

    with pytest.raises(InvalidImageError, match="x: Gone."):
        open_image(LazyImage("x", lost))


def test_every_task_reads_its_own_example(tmp_path: Path):
    for task in TASKS.values():
        folder = tmp_path / task.name
        (folder / "masks").mkdir(parents=True)
        Image.fromarray(np.eye(90, dtype=np.uint8) * 255).save(folder / "masks" / "17.png")
        (folder / f"{task.name}.jsonl").write_text(json.dumps(dict(task.example)))
        (example,) = read_examples(task, folder)
        image = example.images[0]
        assert example.prompt and isinstance(image, Path) and image.is_relative_to(folder)
        assert task.metric().ids == []
    assert find_task("docvqa").published["paligemma-3b-896"] == 84.77
    assert find_task("vatex_cap").published == {
        "paligemma-3b-224": 79.73,
        "paligemma2-3b-224": 80.8,
        "paligemma2-10b-224": 82.7,
    }
    with pytest.raises(ConfigError, match="no evaluation task 'x'"):
        find_task("x")


def test_prompts_are_big_visions():
    prompts = {name: t.task.prompt_of(t.example) for name, t in TASKS.items()}
    assert prompts["vqav2"] == "answer en what is on the table?"
    assert prompts["docvqa"] == "what is on the table?"
    assert prompts["aokvqa_mc"] == "answer en  what is on the table? choose from: cup \t cat"
    assert prompts["xm3600"] == "caption de"
    assert prompts["detection"] == "detect cup ; cat"
    assert prompts["science_qa"].endswith("Options: (A) cup, (B) cat\nAnswer:")


def test_missing_data_says_what_is_expected(tmp_path: Path):
    (tmp_path / "other.txt").touch()
    with pytest.raises(DatasetError) as e:
        read_examples(find_task("docvqa"), tmp_path)
    for said in ("docvqa.jsonl is missing (there: other.txt)", '"answers": ["a cup"'):
        assert said in str(e.value)


def test_every_bad_line_is_listed(tmp_path: Path):
    good = json.dumps({"id": 0, "image": "a.png", "question": "q", "answer": "x"})
    lines = [
        good,
        "",
        "{",
        "[]",
        json.dumps({"id": 1, "image": "a.png", "question": "q"}),
        json.dumps({"image": "a.png", "question": "q", "answer": "x"}),
        json.dumps({"id": 2, "question": "q", "answer": "x"}),
        json.dumps({"id": 3, "image": "../a.png", "question": "q", "answer": "x"}),
        json.dumps({"id": 4, "image": "a.png", "question": 5, "answer": "x"}),
        json.dumps({"id": 5, "image": "a.png", "question": "q", "answer": {}}),
        good,
    ]
    (tmp_path / "gqa.jsonl").write_text("\n".join(lines))
    with pytest.raises(DatasetError) as e:
        read_examples(find_task("gqa"), tmp_path)
    for said in (
        "(9 problems)",
        "gqa.jsonl:3:",
        "gqa.jsonl:4:",
        "gqa.jsonl:5: the field 'answer' is missing",
        "gqa.jsonl:6: expected a text or whole number",
        "gqa.jsonl:7: the field 'image' is missing",
        "gqa.jsonl:8: ",
        "gqa.jsonl:9: 'question'",
        "gqa.jsonl:10: 'answer'",
        "gqa.jsonl:11: the id 0 is that of gqa.jsonl:1 too",
    ):
        assert said in str(e.value)


def built(columns: str, values: dict[str, Any], prefix: str, *answers: str) -> Built:
    """A public builder that training does not use; its image columns begin with "image"."""
    kinds = {name: "image" if name.startswith("image") else "text" for name in columns.split()}
    kinds |= {"texts": "texts"} if "texts" in kinds else {}
    kinds |= {"number": "int"} if "number" in kinds else {}
    return Built(kinds, "", values, prefix, list(answers), "")


BUILDERS = {
    **BUILT,
    "xm3600": BUILT["coco35l"],
    "nocaps": built("image texts", {"texts": ["a", "b"]}, "caption en", "a", "b"),
    "xgqa": built(
        "example_id image question answer", {"question": "rot?", "answer": "yes"},
        "answer en rot?", "yes",
    ),
    "countbenchqa": built(
        "image question number", {"question": "how many?", "number": 4},
        "answer en how many?", "4",
    ),
    "nlvr2": built(
        "image_left image_right sentence label", {"sentence": "both", "label": "True"},
        "answer en both", "True",
    ),
}  # fmt: skip
GROUPS = {
    "vqav2": "anything", "rsvqa_lr": "anything", "rsvqa_hr": "anything", "chartqa": "human",
    "tallyqa": "complex", "pope": "human", "coco35l": "en", "xm3600": "en", "xgqa": "de",
}  # fmt: skip


def give(rows: list[dict[str, Any]], path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose split test_de has these rows."""

    class Source:
        def __init__(self, place: Any, split: str, reader: Any):
            self.reader = reader

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> Any:
            return self.reader(rows[index], f"test_de:{index}")

    folder = path / "human" / "1.0.0"
    folder.mkdir(parents=True)
    for name in ("dataset_info.json", "any-test_de.array_record-00000-of-00001"):
        (folder / name).touch()
    monkeypatch.setattr("paligemma_jax.evaluation.examples.open_source", Source)
    return folder


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_asked_and_right(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    builder, task = BUILDERS[name], find_task(name)
    folder = give([prepared(builder, monkeypatch)], tmp_path, monkeypatch)
    (found,) = read_examples(task, folder, split="test_de")
    assert found.groups == ((GROUPS[name],) if name in GROUPS else ())
    assert len(found.images) == (2 if name == "nlvr2" else 1)
    if name == "refcoco_seg":
        assert found.prompt == f"segment {builder.prefix}"
        assert found.reference.mask.sum() == 90 and found.id == 1
        np.testing.assert_allclose(found.reference.box, (0.1, 0.25, 0.4, 0.75), atol=1e-6)
        return
    assert found.prompt == builder.prefix
    right = getattr(found.reference, "answer", found.reference)
    assert right == (builder.answers if isinstance(right, list) else builder.answers[0])


def test_rows_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = prepared(BUILT["refcoco_seg"], monkeypatch)
    row["objects"]["refs"]["sentence"] = [["a", "b"]]
    folder = give([row], tmp_path, monkeypatch)
    with pytest.raises(DatasetError, match="validation_flat"):
        read_examples(find_task("refcoco_seg"), folder, split="test_de")
    row = prepared(BUILT["aokvqa_mc"], monkeypatch) | {"multiple_choice_correct_idx": -1}
    folder = give([row], tmp_path / "other", monkeypatch)
    with pytest.raises(DatasetError, match="test data has no answers"):
        read_examples(find_task("aokvqa_mc"), folder, split="test_de")
