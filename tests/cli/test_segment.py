"""Masks as lines, JSON, drawings, and files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.cli.demo import SEED
from paligemma_jax.cli.files import file_name_part
from paligemma_jax.demo.render import render, shape_mask
from paligemma_jax.demo.showcase import showcase
from paligemma_jax.evaluation.detection_metrics import paired_overlaps
from paligemma_jax.processing.masks import RLE
from tests.cli.conftest import Run, Says

# The picture is 100 wide and 50 high.
CODES = "".join(f"<seg{code:03d}>" for code in range(16))
TWO = (
    f"<loc0000><loc0000><loc1023><loc0512>{CODES} cat ; "
    f"<loc0205><loc0512><loc0818><loc1023>{CODES} red dog"
)


def test_lines_are_those_of_detect(run: Run, says: Says, picture: Path):
    calls = says(TWO)
    lines = run("segment", picture, "cat ; red dog").out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["0 0 50 50", "50 10 100 40"]
    assert calls == [["segment cat ; red dog"]]


def test_masks_in_json_files_and_picture_are_the_same(
    run: Run, says: Says, picture: Path, tmp_path: Path
):
    says(TWO)
    out, masks = tmp_path / "drawn.png", tmp_path / "masks"
    outcome = run("segment", picture, "cat ; dog", "--json", "--out", out, "--masks", masks)
    document = json.loads(outcome.out)
    assert list(document) == [
        "file", "prompt", "answer", "width", "height", "objects", "unparsed", "out"
    ]  # fmt: skip
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
    drawn = np.asarray(Image.open(out), int) - np.asarray(Image.open(picture), int)
    assert drawn[20:30, 10:40].any()  # in the first box


def test_only_masks_of_sure_objects_are_written(
    run: Run, says: Says, picture: Path, tmp_path: Path
):
    says(TWO)
    outcome = run("segment", picture, "cat", "--masks", tmp_path, "--min-score", 0.5)
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["noise-1-cat.png"]


def test_masks_never_replace_others_unasked(run: Run, says: Says, picture: Path, tmp_path: Path):
    (tmp_path / "noise-1-bird.png").write_text("mine")
    (tmp_path / "noise-a.png").write_text("mine")
    calls = says(TWO)
    command = ["segment", picture, "cat ; dog", "--masks", tmp_path]
    outcome = run(*command)
    assert outcome.code == 1 and "noise-1-bird.png exists already" in outcome.err
    assert "--masks" in outcome.err and not calls
    assert run(*command, "--force").code == 0
    assert (tmp_path / "noise-1-bird.png").read_text() == "mine"


def test_a_mask_never_replaces_the_drawing(run: Run, says: Says, picture: Path, tmp_path: Path):
    """Not even by force: a picture may be called as the mask of another."""
    other = tmp_path / "noise-1-cat.png"
    other.write_bytes(picture.read_bytes())
    says(TWO, TWO)
    out = tmp_path / "out"
    command = ["segment", picture, other, "cat", "--out", out, "--masks", out, "--force"]
    outcome = run(*command)
    assert outcome.code == 1 and "noise-1-cat.png exists already" in outcome.err
    assert Image.open(out / "noise-1-cat.png").mode == "RGB"


def test_masks_go_into_a_directory(run: Run, says: Says, picture: Path, tmp_path: Path):
    calls = says()
    (tmp_path / "file").touch()
    for masks in (tmp_path / "file", tmp_path / "file" / "inside"):
        outcome = run("segment", picture, "cat", "--masks", masks)
        assert outcome.code == 1 and "--masks" in outcome.err and not calls


@pytest.mark.parametrize(
    ("label", "part"),
    [
        ("cat", "cat"),
        ("Red  Café?", "Red-Cafe"),
        ("../../etc/passwd", "etc-passwd"),
        ("猫", "object"),
        ("", "object"),
        ("a" * 99, "a" * 60),
        ("NUL:*", "NUL"),
    ],
)
def test_labels_are_safe_in_names(label: str, part: str):
    assert file_name_part(label) == part


def test_random_model_answers_in_the_grammar(run: Run, store: Path, picture: Path, tmp_path: Path):
    command = ["segment", picture, "star", "--model", store, "--dtype", "float32", "--json"]
    outcome = run(*command, "--max-objects", 1, "--masks", tmp_path / "masks")
    document = json.loads(outcome.out)
    assert not document["unparsed"]
    for one in document["objects"]:
        assert one["label"] == "star" and Path(one["mask"]).exists()


def test_without_a_codec_it_says_where_to_get_one(
    run: Run, pipeline: pg.Pipeline, picture: Path, monkeypatch: pytest.MonkeyPatch
):
    bare = dataclasses.replace(pipeline, mask_codec=None)
    monkeypatch.setattr("paligemma_jax.cli.output.load_pipeline", lambda args: bare)
    outcome = run("segment", picture, "cat")
    assert outcome.code == 1 and "--mask-codec vae-oid.npz" in outcome.err


def test_a_codec_of_the_users(run: Run, store: Path, picture: Path, tmp_path: Path):
    command = ["segment", picture, "star", "--model", store, "--max-objects", 1]
    assert run(*command, "--mask-codec", store / "mask_codec.npz").code == 0
    outcome = run(*command, "--mask-codec", picture)
    assert outcome.code == 1 and "noise.png" in outcome.err and outcome.out == ""
    outcome = run(*command, "--mask-codec", tmp_path / "none.npz")
    assert outcome.code == 1 and "none.npz" in outcome.err


def test_the_embedded_model_segments(run: Run, tmp_path: Path):
    shown = showcase(SEED)
    path = tmp_path / "drawing.png"
    Image.fromarray(render(shown.scene, 224)).save(path)
    outcome = run("segment", path, shown.label, "--json", "--out", tmp_path / "masks.png")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["objects"]
    assert len(found) == len(shown.boxes)
    masks = np.stack([RLE.from_coco(thing["rle"]).to_mask() for thing in found])
    right = np.stack([shape_mask(shape, 224) for shape in shown.shapes])
    assert np.mean(paired_overlaps(masks, right)) > 0.6
    assert min(thing["score"] for thing in found) > 0.5
    assert Image.open(tmp_path / "masks.png").size == (224, 224)
