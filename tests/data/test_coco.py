"""COCO's annotation files: boxes, polygons and run lengths."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_jax.data.coco import CocoSource
from paligemma_jax.errors import DatasetError
from paligemma_jax.loading import demo_checkpoint
from paligemma_jax.processing.location_tokens import parse_answer
from paligemma_jax.processing.masks import RLE, MaskCodec
from paligemma_jax.weights.mask_vae import load_mask_vae

SQUARE = [20, 10, 60, 10, 60, 50, 20, 50]


@pytest.fixture(scope="session")
def codec() -> MaskCodec:
    return MaskCodec(load_mask_vae(demo_checkpoint() / "mask_codec.npz"))


def annotation(number: int, bbox: Any, category: int = 1, image: int = 1, **more: Any) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox} | more


def coco(annotations: list[dict], **changes: Any) -> dict[str, Any]:
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 100, "height": 50},
            {"id": 2, "file_name": "b.png", "width": 80, "height": 60},
        ],
        "categories": [
            {"id": 0, "name": "pets", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "pets"},
            {"id": 2, "name": "dog", "supercategory": "pets"},
        ],
        "annotations": annotations,
    } | changes


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_detection(tmp_path: Path):
    file = coco([annotation(1, [10, 5, 50, 25]), annotation(2, [0, 0, 100, 50], category=2)])
    source = CocoSource(write(tmp_path / "_annotations.coco.json", file))
    first, second = source[0], source[1]
    assert source.classes == ("cat", "dog") and source.problems == ()
    assert first.prefix == second.prefix == "detect cat ; dog"
    assert first.suffix == (
        "<loc0102><loc0102><loc0614><loc0614> cat ; <loc0000><loc0000><loc1023><loc1023> dog"
    )
    assert second.suffix == "" and second.size == (80, 60)
    assert first.images == (tmp_path / "a.png",)
    assert pickle.loads(pickle.dumps(source))[0] == first


def test_boxes_are_clipped_and_skipped_with_a_warning(tmp_path: Path, caplog):
    annotations = [
        annotation(1, [-10, 0, 30, 50]),
        annotation(2, [10, 10, 0, 5]),
        annotation(3, [200, 10, 10, 5]),
        annotation(4, [1, 2, 3]),
        annotation(5, [1, 2, 3, float("nan")]),
        annotation(6, [1, 2, 3, 4], image=9),
        annotation(7, [1, 2, 3, 4], category=9),
        annotation(8, [1, 2, 3, 4], iscrowd=1),
        annotation(9, [99.99, 0, 0.02, 50]),
    ]
    source = CocoSource(write(tmp_path / "x.json", coco(annotations)))
    boxes = parse_answer(source[0].suffix).objects
    assert len(boxes) == 2 and boxes[0].x1 == 0 and round(boxes[0].x2, 1) == 0.2
    told = {problem.where.rpartition(" ")[2]: problem.text for problem in source.problems}
    assert list(told) == ["1", "2", "3", "4", "5", "6", "7"]
    assert "leaves the image; clipped" in told["1"] and "has no area" in told["2"]
    assert "outside of the image" in told["3"] and "four numbers" in told["4"]
    assert "not finite" in told["5"]
    assert "skipped or clipped 7 boxes or masks" in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must be a COCO annotation file"),
        ({"images": []}, "lacks annotations and categories"),
        (coco([], images=[]), "has no images"),
        (coco([], images=[{"id": 1, "file_name": "a.png"}]), "an id of its own"),
        (coco([], categories=[]), "has no classes"),
        (coco([], categories=[{"id": 1, "name": "a;b"}]), r"names={'a;b': 'a,b'}"),
    ],
)
def test_malformed_files(tmp_path: Path, data: Any, message: str):
    with pytest.raises(DatasetError, match=message):
        CocoSource(write(tmp_path / "x.json", data))


def test_classes_can_be_renamed(tmp_path: Path):
    file = coco([], categories=[{"id": 1, "name": "a;b"}])
    source = CocoSource(write(tmp_path / "x.json", file), names={"a;b": "a or b"})
    assert source[0].prefix == "detect a or b"


def test_segmentation_of_polygons_and_runs(tmp_path: Path, codec: MaskCodec):
    mask = np.zeros((50, 100), bool)
    mask[10:50, 20:60] = True
    annotations = [
        annotation(1, [0, 0, 9, 9], segmentation=[SQUARE]),
        annotation(2, [0, 0, 9, 9], segmentation=RLE.from_mask(mask).to_coco(), category=2),
        annotation(
            3,
            [0, 0, 9, 9],
            segmentation={"size": list(mask.shape), "counts": list(RLE.from_mask(mask).counts)},
            category=2,
        ),
        annotation(4, [0, 0, 9, 9]),
        annotation(5, [0, 0, 9, 9], segmentation=[[1, 1, 2, 2, 300, 3]]),
        annotation(6, [0, 0, 9, 9], segmentation={"size": [60, 80], "counts": [4800]}, image=2),
    ]
    source = CocoSource(write(tmp_path / "x.json", coco(annotations)), codec=codec)
    polygon, run, raw = parse_answer(source[0].suffix).objects
    assert source[0].prefix == "segment cat ; dog"
    assert (polygon.label, run.label) == ("cat", "dog") and raw == run
    assert polygon.codes == run.codes and len(run.codes or ()) == 16
    assert [round(v, 2) for v in (run.y1, run.x1, run.y2, run.x2)] == [0.2, 0.2, 1.0, 0.6]
    assert source[1].suffix == ""
    texts = [problem.text for problem in source.problems]
    assert len(texts) == 3 and "no mask" in texts[0] and "inside the image" in texts[1]
    assert "is empty" in texts[2]
    assert len(pickle.dumps(source)) < 5000  # the codec stays behind
