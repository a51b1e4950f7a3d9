"""Boxes as lines, as JSON and drawn; pictures written whole, and never over others."""

import json
from pathlib import Path

import pytest
from PIL import Image

from paligemma_jax.cli import picture_files
from paligemma_jax.errors import PaliGemmaError
from tests.cli.conftest import Run

# The picture is 100 wide and 50 high.
TWO = "<loc0000><loc0000><loc1023><loc0512> cat ; <loc0205><loc0512><loc0818><loc1023> dog"


def test_lines_are_in_pixels(run: Run, says, picture: Path):
    says(TWO)
    assert run("detect", picture, "cat ; dog").out == "cat: 0 0 50 50\ndog: 50 10 100 40\n"


def test_nothing_found_is_an_answer(run: Run, says, picture: Path):
    says("")
    outcome = run("detect", picture, "cat")
    assert outcome.code == 0 and outcome.out == "nothing found\n"


def test_json_holds_boxes_and_the_written_picture(run: Run, says, picture: Path, tmp_path: Path):
    says(TWO)
    out = tmp_path / "boxes.png"
    document = json.loads(run("detect", picture, "cat ; dog", "--json", "--out", out).out)
    assert document["width"] == 100 and document["height"] == 50
    assert document["objects"][0] == {"label": "cat", "box": [0.0, 0.0, 50.0, 50.0]}
    assert document["answer"] == TWO and document["out"] == str(out)
    drawn, original = Image.open(out), Image.open(picture)
    assert drawn.size == original.size and drawn.tobytes() != original.tobytes()


def test_several_pictures_go_into_a_directory(run: Run, says, picture: Path, tmp_path: Path):
    other = tmp_path / "other.jpg"
    Image.open(picture).save(other)
    says(TWO, TWO)
    outcome = run("detect", picture, other, "cat", "--out", tmp_path / "boxes")
    assert outcome.code == 0, outcome.err
    assert sorted(p.name for p in (tmp_path / "boxes").iterdir()) == ["noise.png", "other.png"]


@pytest.mark.parametrize("out", ["taken.png", "noise.txt", "noise", "taken.png/inside.png"])
def test_unwritable_targets_are_refused_before_any_work(
    run: Run, says, picture: Path, tmp_path: Path, out: str
):
    (tmp_path / "taken.png").write_text("mine")
    calls = says()
    outcome = run("detect", picture, "cat", "--out", tmp_path / out)
    assert outcome.code == 1 and outcome.err.startswith("paligemma: error: ")
    assert not calls
    assert [p.name for p in tmp_path.iterdir()] == ["taken.png"]
    assert (tmp_path / "taken.png").read_text() == "mine"


def test_force_replaces(run: Run, says, picture: Path, tmp_path: Path):
    (tmp_path / "taken.png").write_text("old")
    says(TWO)
    assert run("detect", picture, "cat", "--out", tmp_path / "taken.png", "--force").code == 0
    assert Image.open(tmp_path / "taken.png").size == (100, 50)


def test_pictures_of_one_name_are_refused(run: Run, says, picture: Path, tmp_path: Path):
    (tmp_path / "noise.png").write_bytes(picture.read_bytes())
    says()
    outcome = run("detect", picture, tmp_path / "noise.png", "cat", "--out", tmp_path / "boxes")
    assert outcome.code == 1 and "called the same" in outcome.err


def test_one_file_for_several_pictures_is_refused(run: Run, says, picture: Path, tmp_path: Path):
    says()
    outcome = run("detect", picture, "other.png", "cat", "--out", tmp_path / "boxes.png")
    assert outcome.code == 1 and "A directory fits" in outcome.err


def test_names_of_standard_input_and_addresses(tmp_path: Path):
    targets = picture_files.plan_targets(
        f"{tmp_path}/new/", ["-", "https://example.org/a/cat.jpg?size=2"], force=False
    )
    assert [path.name for path in targets.values()] == ["stdin.png", "cat.png"]


def test_a_failed_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(PaliGemmaError, match="No space left"):
        picture_files.save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_address_needs_permission(run: Run, says):
    says()
    outcome = run("caption", "https://example.org/cat.jpg")
    assert outcome.code == 1 and "--allow-urls" in outcome.err
