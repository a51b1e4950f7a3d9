"""detect and segment: objects as lines, JSON, drawings, attention maps and mask files."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.cli.box_commands import box_attention_maps
from paligemma_jax.cli.demo import SEED
from paligemma_jax.demo.render import render, shape_mask
from paligemma_jax.demo.showcase import showcase
from paligemma_jax.evaluation.detection_metrics import paired_overlaps
from paligemma_jax.generation.attention_maps import image_attention_maps
from tests.cli.conftest import Run, Says

# The image is 100 wide and 50 high.
TWO = "<loc0000><loc0000><loc1023><loc0512> cat ; <loc0205><loc0512><loc0818><loc1023> dog"
CODES = "".join(f"<seg{code:03d}>" for code in range(16))
MASKS = (
    f"<loc0000><loc0000><loc1023><loc0512>{CODES} cat ; "
    f"<loc0205><loc0512><loc0818><loc1023>{CODES} red dog"
)
NEAR = 0.6  # between the scores of the two


def test_lines_are_in_pixels_with_scores(run: Run, says: Says, image: Path):
    calls = says(TWO, MASKS, "")
    for command in ("detect", "segment"):
        lines = run(command, image, "cat ; dog").out.splitlines()
        found = [re.fullmatch(r"([\w ]+) \((0\.\d\d)\): ([\d ]+)", line) for line in lines]
        (one, first, box), (_, second, other) = (match.groups() for match in found if match)
        assert (one, box, other) == ("cat", "0 0 50 50", "50 10 100 40")
        assert float(first) > NEAR > float(second)
    assert calls == [["detect cat ; dog"], ["segment cat ; dog"]]
    outcome = run("detect", image, "cat")
    assert outcome.code == 0 and outcome.out == "nothing found\n"


def test_json_of_detect(run: Run, says: Says, image: Path, tmp_path: Path):
    says(f"{TWO} ; and more")
    out = tmp_path / "boxes.png"
    document = json.loads(run("detect", image, "cat ; dog", "--json", "--out", out).out)
    assert list(document) == [
        "file", "prompt", "text", "width", "height", "objects", "unparsed", "out"
    ]  # fmt: skip
    assert document["width"] == 100 and document["height"] == 50
    first, second = document["objects"]
    assert list(first) == ["label", "box", "score"] and first["score"] > NEAR > second["score"]
    assert first["label"] == "cat" and first["box"] == [0.0, 0.0, 50.0, 50.0]
    assert document["text"] == f"{TWO} ; and more" and document["out"] == str(out)
    assert "and more" in document["unparsed"][0]["text"]
    drawn, original = Image.open(out), Image.open(image)
    assert drawn.size == original.size and drawn.tobytes() != original.tobytes()


def test_min_score_and_nms(run: Run, says: Says, image: Path, tmp_path: Path):
    near = f"{TWO} ; <loc0000><loc0000><loc1000><loc0512> cat"
    says(TWO, near, near, near, MASKS)
    command = ["detect", image, "cat ; dog"]
    document = json.loads(run(*command, "--min-score", NEAR, "--json").out)
    assert [one["label"] for one in document["objects"]] == ["cat"] and document["text"] == TWO
    assert len(run(*command, "--nms-iou", 1).out.splitlines()) == 3
    lines = run(*command, "--attention-map", tmp_path / "a.png", "--nms-iou", 0.9).out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["0 0 50 50", "50 10 100 40"]
    assert run(*command, "--nms-iou", 0.9, "--min-score", NEAR).out == f"{lines[0]}\n"
    run("segment", image, "cat", "--masks", tmp_path / "masks", "--min-score", NEAR)
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["noise-1-cat.png"]


def test_random_model_answers_in_the_grammar(run: Run, store: Path, image: Path, tmp_path: Path):
    model = ["--model", store, "--json", "--dtype", "float32", "--max-objects", 2]
    command = ["detect", image, image, "red circle ; star", *model, "--max-new-tokens", 64]
    outcome = run(*command)
    assert outcome.code == 0, outcome.err
    for document in map(json.loads, outcome.out.splitlines()):
        assert len(document["objects"]) <= 2 and not document["unparsed"]
        assert {one["label"] for one in document["objects"]} <= {"red circle", "star"}
        assert all(0 <= one["score"] <= 1 for one in document["objects"])
    outcome = run("segment", image, "star", *model, "--masks", tmp_path / "masks")
    for one in json.loads(outcome.out)["objects"]:
        assert one["label"] == "star" and Path(one["mask"]).exists()


@pytest.mark.parametrize("labels", [";", "red\ncircle", "<loc0001>"])
def test_bad_labels(run: Run, store: Path, image: Path, labels: str):
    outcome = run("detect", image, labels, "--model", store)
    assert outcome.code == 1 and outcome.err.startswith("paligemma: error: ")
    assert "label" in outcome.err and outcome.out == ""


def test_an_iou_of_0_is_wrong_usage(run: Run, image: Path, tmp_path: Path):
    outcome = run("detect", image, "cat", "--nms-iou", 0, "--model", tmp_path / "no-model")
    assert outcome.code == 2 and "--nms-iou" in outcome.err and "no-model" not in outcome.err


def test_attention_map_has_a_panel_a_box(run: Run, says: Says, image: Path, tmp_path: Path):
    says(TWO, TWO, "")
    command = ["detect", image, "cat ; dog", "--json", "--attention-map"]
    one, two, none = tmp_path / "one.png", tmp_path / "two.png", tmp_path / "none.png"
    document = json.loads(run(*command, two).out)
    assert document["attention_map"] == str(two) and "out" not in document
    assert run(*command, one, "--min-score", NEAR).code == 0
    assert run(*command, none).code == 0
    widths = [Image.open(path).width for path in (none, one, two)]
    assert widths[0] < widths[1] < widths[2]


def test_a_box_s_map_is_the_mean_of_its_location_tokens(pipeline: pg.Pipeline, image: Path):
    loaded = pg.load_image(image)
    found, nothing = box_attention_maps(pipeline, [loaded] * 2, "detect cat ; dog", [TWO, ""])
    assert found.shape == (2, 1, 2, 2) and nothing.shape == (0, 1, 2, 2)
    batch = pipeline.processor([loaded], ["detect cat ; dog"])
    tokens = pipeline.processor.tokenizer.encode(TWO)
    (maps,) = image_attention_maps(pipeline.model, batch, [tokens])
    start = pipeline.processor.tokenizer.loc_start
    locations = [i for i, token in enumerate(tokens) if start <= token < start + 1024]
    assert len(locations) == 8
    np.testing.assert_allclose(found[0], maps[locations[:4]].mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found[1], maps[locations[4:]].mean(axis=0), rtol=1e-4)


def test_masks_in_json_files_and_drawing_are_the_same(
    run: Run, says: Says, image: Path, tmp_path: Path
):
    says(MASKS)
    out, masks = tmp_path / "drawn.png", tmp_path / "masks"
    outcome = run("segment", image, "cat ; dog", "--json", "--out", out, "--masks", masks)
    document = json.loads(outcome.out)
    names = ["noise-1-cat.png", "noise-2-red-dog.png"]
    assert sorted(path.name for path in masks.iterdir()) == names
    for one, name in zip(document["objects"], names, strict=True):
        assert list(one) == ["label", "box", "score", "rle", "polygons", "mask"]
        assert one["mask"] == str(masks / name)
        written = Image.open(masks / name)
        assert written.mode == "L" and written.size == (100, 50)
        pixels = np.asarray(written)
        assert set(np.unique(pixels)) == {0, 255}
        np.testing.assert_array_equal(pixels == 255, pg.RLE.from_coco(one["rle"]).to_mask())
        assert one["polygons"][0]["exterior"]
        x1, y1, x2, y2 = map(round, one["box"])
        pixels = pixels.copy()
        pixels[y1:y2, x1:x2] = 0
        assert not pixels.any()
    drawn = np.asarray(Image.open(out), int) - np.asarray(Image.open(image), int)
    assert drawn[20:30, 10:40].any()  # in the first box


def test_masks_never_replace_others_unasked(run: Run, says: Says, image: Path, tmp_path: Path):
    (tmp_path / "noise-1-bird.png").write_text("mine")
    (tmp_path / "noise-a.png").write_text("mine")
    calls = says(MASKS)
    command = ["segment", image, "cat ; dog", "--masks", tmp_path]
    outcome = run(*command)
    assert outcome.code == 1 and "noise-1-bird.png exists" in outcome.err
    assert "--masks" in outcome.err and not calls
    assert run(*command, "--force").code == 0
    assert (tmp_path / "noise-1-bird.png").read_text() == "mine"
    for masks in (tmp_path / "noise-a.png", tmp_path / "noise-a.png" / "inside"):
        outcome = run("segment", image, "cat", "--masks", masks)
        assert outcome.code == 1 and "--masks" in outcome.err and len(calls) == 1


def test_a_mask_never_replaces_the_drawing(run: Run, says: Says, image: Path, tmp_path: Path):
    """Not even by force: an image may be called as the mask of another."""
    other = tmp_path / "noise-1-cat.png"
    other.write_bytes(image.read_bytes())
    says(MASKS, MASKS)
    out = tmp_path / "out"
    command = ["segment", image, other, "cat", "--out", out, "--masks", out, "--force"]
    outcome = run(*command)
    assert outcome.code == 1 and "noise-1-cat.png exists" in outcome.err
    assert Image.open(out / "noise-1-cat.png").mode == "RGB"


def test_the_mask_codec(
    run: Run, store: Path, pipeline: pg.Pipeline, image: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    command = ["segment", image, "star", "--model", store, "--max-objects", 1]
    assert run(*command, "--mask-codec", store / "mask_codec.npz").code == 0
    for path in (image, tmp_path / "none.npz"):
        outcome = run(*command, "--mask-codec", path)
        assert outcome.code == 1 and path.name in outcome.err and outcome.out == ""
    bare = dataclasses.replace(pipeline, mask_codec=None)
    monkeypatch.setattr("paligemma_jax.loading.from_pretrained", lambda *_, **__: bare)
    outcome = run("segment", image, "cat")
    assert outcome.code == 1 and "--mask-codec vae-oid.npz" in outcome.err


def test_the_bundled_model_segments(run: Run, tmp_path: Path):
    shown = showcase(SEED)
    path = tmp_path / "drawing.png"
    Image.fromarray(render(shown.scene, 224)).save(path)
    outcome = run("segment", path, shown.label, "--json", "--out", tmp_path / "masks.png")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["objects"]
    assert len(found) == len(shown.boxes)
    masks = np.stack([pg.RLE.from_coco(thing["rle"]).to_mask() for thing in found])
    right = np.stack([shape_mask(shape, 224) for shape in shown.shapes])
    assert np.mean(paired_overlaps(masks, right)) > 0.6
    assert min(thing["score"] for thing in found) > 0.5
    assert Image.open(tmp_path / "masks.png").size == (224, 224)
