"""Boxes as lines, as JSON and drawn, and what was looked at for them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.cli import box_commands as heat_maps
from paligemma_jax.cli import options
from paligemma_jax.generation.attention_maps import image_attention_maps
from paligemma_jax.generation.config import MAX_NEW_TOKENS
from paligemma_jax.generation.detection_grammar import MAX_OBJECTS
from paligemma_jax.pipeline import MAX_OBJECT_TOKENS
from paligemma_jax.processing.video import FRAMES
from tests.cli.conftest import Run, Says

# The picture is 100 wide and 50 high.
TWO = "<loc0000><loc0000><loc1023><loc0512> cat ; <loc0205><loc0512><loc0818><loc1023> dog"
NEAR = 0.6  # between the scores of the two


def test_defaults_are_the_library_s():
    numbers = options.MAX_NEW_TOKENS, options.MAX_OBJECT_TOKENS, options.MAX_OBJECTS, options.FRAMES
    assert numbers == (MAX_NEW_TOKENS, MAX_OBJECT_TOKENS, MAX_OBJECTS, FRAMES)


def test_lines_are_in_pixels_with_scores(run: Run, says: Says, picture: Path):
    calls = says(TWO)
    lines = run("detect", picture, "cat ; dog").out.splitlines()
    words = [re.fullmatch(r"(\w+) \((0\.\d\d)\): ([\d ]+)", line) for line in lines]
    found = [word.groups() for word in words if word]
    assert [(label, corners) for label, _, corners in found] == [
        ("cat", "0 0 50 50"), ("dog", "50 10 100 40")
    ]  # fmt: skip
    first, second = (float(score) for _, score, _ in found)
    assert first > NEAR > second
    assert calls == [["detect cat ; dog"]]


def test_nothing_found_is_an_answer(run: Run, says: Says, picture: Path):
    says("")
    outcome = run("detect", picture, "cat")
    assert outcome.code == 0 and outcome.out == "nothing found\n"


def test_json_holds_boxes_and_the_written_picture(
    run: Run, says: Says, picture: Path, tmp_path: Path
):
    says(f"{TWO} ; and more")
    out = tmp_path / "boxes.png"
    document = json.loads(run("detect", picture, "cat ; dog", "--json", "--out", out).out)
    assert list(document) == [
        "file", "prompt", "answer", "width", "height", "objects", "unparsed", "out"
    ]  # fmt: skip
    assert document["width"] == 100 and document["height"] == 50
    first, second = document["objects"]
    assert list(first) == ["label", "box", "score"] and first["score"] > NEAR > second["score"]
    assert first["label"] == "cat" and first["box"] == [0.0, 0.0, 50.0, 50.0]
    assert document["answer"] == f"{TWO} ; and more" and document["out"] == str(out)
    assert "and more" in document["unparsed"][0]["text"]
    drawn, original = Image.open(out), Image.open(picture)
    assert drawn.size == original.size and drawn.tobytes() != original.tobytes()


def test_less_sure_objects_are_left_out(run: Run, says: Says, picture: Path, tmp_path: Path):
    says(TWO, TWO)
    command = ["detect", picture, "cat ; dog", "--min-score", NEAR]
    assert re.fullmatch(r"cat \(0\.\d\d\): 0 0 50 50\n", run(*command).out)
    document = json.loads(run(*command, "--json").out)
    assert [one["label"] for one in document["objects"]] == ["cat"]
    assert document["answer"] == TWO


def test_of_objects_alike_the_surest_is_kept(run: Run, says: Says, picture: Path, tmp_path: Path):
    near = "<loc0000><loc0000><loc1000><loc0512> cat"
    says(f"{TWO} ; {near}", f"{TWO} ; {near}", f"{TWO} ; {near}")
    command = ["detect", picture, "cat ; dog"]
    assert len(run(*command, "--max-overlap", 1).out.splitlines()) == 3
    sheet = ["--heat-map", tmp_path / "a.png", "--max-overlap", 0.9]
    lines = run(*command, *sheet).out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["0 0 50 50", "50 10 100 40"]
    assert run(*command, "--max-overlap", 0.9, "--min-score", NEAR).out == f"{lines[0]}\n"


def test_random_model_answers_in_the_grammar(run: Run, store: Path, picture: Path):
    command = ["detect", picture, picture, "red circle ; star", "--model", store, "--json"]
    outcome = run(*command, "--max-objects", 2, "--max-new-tokens", 64, "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    for document in map(json.loads, outcome.out.splitlines()):
        assert len(document["objects"]) <= 2 and not document["unparsed"]
        assert {one["label"] for one in document["objects"]} <= {"red circle", "star"}
        assert all(0 <= one["score"] <= 1 for one in document["objects"])


def test_room_for_no_object_is_an_error(run: Run, store: Path, picture: Path):
    outcome = run("detect", picture, "star", "--model", store, "--max-new-tokens", 2)
    assert outcome.code == 1 and "one object" in outcome.err


@pytest.mark.parametrize("labels", [";", "red\ncircle", "<loc0001>"])
def test_bad_labels(run: Run, store: Path, picture: Path, labels: str):
    outcome = run("detect", picture, labels, "--model", store)
    assert outcome.code == 1 and outcome.err.startswith("paligemma: error: ")
    assert "label" in outcome.err and outcome.out == ""


def test_heat_map_has_a_panel_a_box(run: Run, says: Says, picture: Path, tmp_path: Path):
    says(TWO, TWO, "")
    command = ["detect", picture, "cat ; dog", "--json", "--heat-map"]
    one, two, none = tmp_path / "one.png", tmp_path / "two.png", tmp_path / "none.png"
    document = json.loads(run(*command, two).out)
    assert document["heat_map"] == str(two) and "out" not in document
    assert run(*command, one, "--min-score", NEAR).code == 0
    assert run(*command, none).code == 0
    widths = [Image.open(path).width for path in (none, one, two)]
    assert widths[0] < widths[1] < widths[2]


def test_looked_at_is_the_mean_of_the_four_location_tokens(pipeline: pg.Pipeline, picture: Path):
    image = pg.load_image(picture)
    seen, nothing = heat_maps.looked_at(pipeline, [image] * 2, "detect cat ; dog", [TWO, ""])
    assert seen.shape == (2, 1, 2, 2) and nothing.shape == (0, 1, 2, 2)
    batch = pipeline.processor([image], ["detect cat ; dog"])
    tokens = pipeline.processor.tokenizer.encode(TWO)
    (maps,) = image_attention_maps(pipeline.model, batch, [tokens])
    start = pipeline.processor.tokenizer.loc_start
    locations = [i for i, token in enumerate(tokens) if start <= token < start + 1024]
    assert len(locations) == 8
    np.testing.assert_allclose(seen[0], maps[locations[:4]].mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(seen[1], maps[locations[4:]].mean(axis=0), rtol=1e-4)


def test_two_outputs_cannot_be_one_file(run: Run, says: Says, picture: Path, tmp_path: Path):
    calls = says()
    out = tmp_path / "a.png"
    outcome = run("detect", picture, "cat", "--out", out, "--heat-map", out, "--force")
    assert outcome.code == 1 and "written twice" in outcome.err and not calls


def test_a_failed_write_is_reported_and_the_others_go_on(
    run: Run, says: Says, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "other.png"
    other.write_bytes(picture.read_bytes())
    says(TWO, TWO)
    real = Image.Image.save

    def save(image: Image.Image, file: object, *args: object, **kwargs: object) -> None:
        monkeypatch.setattr(Image.Image, "save", real)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    out = tmp_path / "boxes"
    outcome = run("detect", picture, other, "cat ; dog", "--out", out, "--json")
    first, second = map(json.loads, outcome.out.splitlines())
    assert outcome.code == 1 and "No space left" in first["error"] and first["answer"] == TWO
    assert second["out"] == str(out / "other.png")
    assert [path.name for path in out.iterdir()] == ["other.png"]
