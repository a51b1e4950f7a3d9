"""The demo: prompts, answers and truth beside each other, and an image."""

import dataclasses
import re
from pathlib import Path

import pytest
from PIL import Image

from paligemma_jax.cli.demo import IMAGE_SIZE, SEED, boxes_agree
from paligemma_jax.demo.showcase import Showcase, showcase
from paligemma_jax.processing.location_tokens import Box, format_answer
from tests.cli.conftest import Run


def answers_of(shown: Showcase) -> list[str]:
    """What a model says that is right about everything, but for masks of no meaning."""
    masks = [dataclasses.replace(box, codes=(7,) * 16) for box in shown.boxes]
    words = [example.answer for example in shown.examples]
    return [*words, format_answer(shown.boxes), format_answer(masks)]


def test_right_answers_are_marked_right(
    run: Run, says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shown = showcase(SEED)
    says(*answers_of(shown))
    outcome = run("demo")
    assert outcome.code == 0, outcome.err
    assert f"of {len(shown.examples) + 2} right" in outcome.out
    # The scripted model's codec knows nothing; whatever its masks are, the rest is right.
    assert len(re.findall("^✓", outcome.out, re.MULTILINE)) >= len(shown.examples) + 1
    assert not re.search(r"^✗  (?!segment)", outcome.out, re.MULTILINE)
    for words in ("caption es", "how many", "ocr", "detect", "--model"):
        assert words in outcome.out
    assert "paligemma ocr paligemma-demo.png" in outcome.out  # an image that exists
    assert Image.open(tmp_path / "paligemma-demo.png").size == (IMAGE_SIZE, IMAGE_SIZE)
    says(*["x"] * 9)
    assert run("demo", "--seed", 5).code == 0  # leaves the first image
    assert len(list(tmp_path.glob("paligemma-demo*.png"))) == 2


def test_wrong_answers_are_marked_wrong(
    run: Run, says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    shown = showcase(SEED)
    answers = answers_of(shown)
    says(*answers[:-3], "nonsense", "", "")
    out = run("demo", "--out", tmp_path / "x.png").out
    assert f"{len(answers) - 3} of {len(answers)} right" in out
    assert re.search(r"^✗  segment .*nothing found", out, re.MULTILINE)
    assert re.search(r"^✗  ocr +nonsense", out, re.MULTILINE)
    assert re.search(r"^✗  detect .*nothing found", out, re.MULTILINE)
    table = out[out.index("prompt ") : out.index(" right.")]
    assert max(map(len, table.splitlines())) <= 80


def test_image_of_the_user(run: Run, says, image: Path, tmp_path: Path):
    box = "<loc0000><loc0000><loc1023><loc0512>"
    says(*["x"] * 6, f"{box} shape", f"{box}{'<seg007>' * 16} shape")
    outcome = run("demo", "--image", image, "--out", tmp_path / "x.png")
    assert outcome.code == 0, outcome.err
    assert "truth" not in outcome.out and "right" not in outcome.out
    assert Image.open(tmp_path / "x.png").size == (100, 50)


def test_scene_has_something_for_every_question():
    for seed in range(20):
        shown = showcase(seed)
        assert shown == showcase(seed)
        assert len(shown.scene.shapes) >= 3 and shown.scene.text
        assert all(example.answer for example in shown.examples)
        assert len(shown.boxes) == len(shown.shapes) >= 1
        assert {box.label for box in shown.boxes} == {shown.label}


def test_boxes_agree_one_to_one():
    box, moved = Box("cat", 0.1, 0.1, 0.5, 0.5), Box("cat", 0.15, 0.1, 0.55, 0.5)
    far = Box("cat", 0.4, 0.4, 0.8, 0.8)
    assert boxes_agree([moved], [box]) and boxes_agree([], [])
    assert not boxes_agree([far], [box])
    assert not boxes_agree([moved], [box, box]) and not boxes_agree([moved, moved], [box])
    assert not boxes_agree([dataclasses.replace(box, label="dog")], [box])


def test_bundled_model_knows_its_world(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    outcome = run("demo", "--out", tmp_path / "x.png")
    assert outcome.code == 0, outcome.err
    right = re.search(r"(\d) of (\d) right", outcome.out)
    assert right and int(right[1]) >= int(right[2]) - 1, outcome.out
