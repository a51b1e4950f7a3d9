"""Rows as the public builders prepare them, to what is asked and what is right."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_jax.errors import DatasetError
from paligemma_jax.evaluation.examples import read_examples
from paligemma_jax.evaluation.metric import Grouped
from paligemma_jax.evaluation.tasks import find_benchmark
from tests.data.builders import BUILT, PERSONS, Built
from tests.data.test_builders import prepared

TEXT = {"image/id": "text", "image": "image"}
MEASURED = {  # benchmark -> what its builder prepares, and the right answer
    "vqav2": (BUILT["vqav2"], Grouped("anything", PERSONS)),
    "textvqa": (BUILT["textvqa"], PERSONS),
    "okvqa": (BUILT["okvqa"], PERSONS),
    "aokvqa-da": (BUILT["aokvqa_da"], PERSONS),
    "vizwizvqa": (BUILT["vizwizvqa"], PERSONS[:9]),
    "aokvqa-mc": (BUILT["aokvqa_mc"], "cup"),
    "ai2d": (BUILT["ai2d"], "a Fox"),
    "gqa": (BUILT["gqa"], "yes"),
    "scienceqa": (BUILT["science_qa"], "B"),
    "rsvqa-lr": (BUILT["rsvqa_lr"], Grouped("anything", "Yes")),
    "rsvqa-hr": (BUILT["rsvqa_hr"], Grouped("anything", "Yes")),
    "chartqa": (BUILT["chartqa"], Grouped("human", "12 %")),
    "docvqa": (BUILT["docvqa"], ["May 2", "2 May"]),
    "infovqa": (BUILT["infovqa"], ["STOP", "Stop sign"]),
    "stvqa": (BUILT["stvqa"], ["STOP", "Stop sign"]),
    "tallyqa": (BUILT["tallyqa"], Grouped("complex", 3)),
    "pope": (BUILT["pope"], Grouped("human", "no")),
    "cococap": (BUILT["cococap"], ["A cup.", "The Cup"]),
    "textcaps": (BUILT["textcaps"], ["A sign: STOP", "Stop"]),
    "scicap": (BUILT["scicap"], ["loss of 2 runs ."]),
    "screen2words": (BUILT["screen2words"], ["a Page", "page of b"]),
    "widgetcap": (BUILT["widgetcap"], ["go back", "Back"]),
    "coco35l": (BUILT["coco35l"], Grouped("en", ["a cup .", "the cup ."])),
    "xm3600": (BUILT["coco35l"], Grouped("en", ["a cup .", "the cup ."])),
    "nocaps": (
        Built({"image/id": "int", "image_filepath": "text", "url": "text", "image": "image",
               "texts": "texts"}, "", {"texts": ["a", "b"]}, "caption en", [], ""),
        ["a", "b"],
    ),
    "xgqa": (
        Built({"example_id": "text", **TEXT, "question": "text", "answer": "text"}, "",
              {"question": "rot?", "answer": "yes"}, "answer en rot?", [], ""),
        Grouped("de", "yes"),
    ),
    "countbenchqa": (
        Built({"image": "image", "image_id": "int", "question": "text", "text": "text",
               "image_url": "text", "number": "int"}, "",
              {"question": "how many?", "number": 4}, "answer en how many?", [], ""),
        4,
    ),
    "nlvr2": (
        Built({"image_left": "image", "image_right": "image", "sentence": "text", "label": "text",
               "example_id": "text"}, "", {"sentence": "both", "label": "True"},
              "answer en both", [], ""),
        "True",
    ),
    "refcoco": (BUILT["refcoco_seg"], None),
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


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_asked_and_right(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built, right = MEASURED[name]
    row = prepared(built, monkeypatch)
    folder = give([row], tmp_path, monkeypatch)
    (found,) = read_examples(find_benchmark(name), folder, split="test_de")
    asked = {
        "pope": f"answer en {built.prefix}", "refcoco": f"segment {built.prefix}"
    }.get(name, built.prefix)  # fmt: skip
    assert found.prompt == asked
    assert len(found.images) == (2 if name == "nlvr2" else 1)
    if name == "refcoco":
        assert found.reference.mask.sum() == 90 and found.id == 1
        np.testing.assert_allclose(found.reference.box, (0.1, 0.25, 0.4, 0.75), atol=1e-6)
    elif name in ("aokvqa-mc", "ai2d"):
        assert found.reference.answer == right
    else:
        assert found.reference == right


def test_rows_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = prepared(BUILT["refcoco_seg"], monkeypatch)
    row["objects"]["refs"]["sentence"] = [["a", "b"]]
    folder = give([row], tmp_path, monkeypatch)
    with pytest.raises(DatasetError, match="as in the splits validation_flat"):
        read_examples(find_benchmark("refcoco"), folder, split="test_de")
    row = prepared(BUILT["aokvqa_mc"], monkeypatch) | {"multiple_choice_correct_idx": -1}
    folder = give([row], tmp_path / "other", monkeypatch)
    with pytest.raises(DatasetError, match="test data has none"):
        read_examples(find_benchmark("aokvqa-mc"), folder, split="test_de")
