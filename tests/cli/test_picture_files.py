"""Files are written whole or not at all, and never over others."""

from pathlib import Path

import pytest
from PIL import Image

from paligemma_jax.cli import files as picture_files
from paligemma_jax.errors import PaliGemmaError
from tests.cli.conftest import Run, Says

ONE = "<loc0000><loc0000><loc1023><loc0512> cat"


def test_several_pictures_go_into_a_directory(run: Run, says: Says, picture: Path, tmp_path: Path):
    other = tmp_path / "other.jpg"
    Image.open(picture).save(other)
    says(ONE, ONE)
    outcome = run("detect", picture, other, "cat", "--out", tmp_path / "boxes")
    assert outcome.code == 0, outcome.err
    assert sorted(p.name for p in (tmp_path / "boxes").iterdir()) == ["noise.png", "other.png"]


@pytest.mark.parametrize("option", ["--out", "--heat-map"])
@pytest.mark.parametrize(
    "out", ["taken.png", "noise.txt", "noise", "taken.png/inside.png", f"{'long' * 99}.png"]
)
def test_unwritable_targets_are_refused_before_any_work(
    run: Run, says: Says, picture: Path, tmp_path: Path, option: str, out: str
):
    (tmp_path / "taken.png").write_text("mine")
    calls = says()
    outcome = run("detect", picture, "cat", option, tmp_path / out)
    assert outcome.code == 1 and outcome.err.startswith("paligemma: error: ")
    assert option in outcome.err and not calls
    assert [p.name for p in tmp_path.iterdir()] == ["taken.png"]
    assert (tmp_path / "taken.png").read_text() == "mine"


def test_force_replaces(run: Run, says: Says, picture: Path, tmp_path: Path):
    (tmp_path / "taken.png").write_text("old")
    says(ONE)
    assert run("detect", picture, "cat", "--out", tmp_path / "taken.png", "--force").code == 0
    assert Image.open(tmp_path / "taken.png").size == (100, 50)


def test_pictures_of_one_name_are_refused(run: Run, says: Says, picture: Path, tmp_path: Path):
    (tmp_path / "noise.png").write_bytes(picture.read_bytes())
    says()
    for command in (["detect", "--out"], ["detect", "--heat-map"], ["segment", "--masks"]):
        arguments = [picture, tmp_path / "noise.png", "cat", command[1], tmp_path / "boxes"]
        outcome = run(command[0], *arguments)
        assert outcome.code == 1 and "called the same" in outcome.err


def test_a_picture_given_twice_is_written_once(run: Run, says: Says, picture: Path, tmp_path: Path):
    says(ONE, ONE)
    outcome = run("detect", picture, picture, "cat", "--out", tmp_path / "boxes", "--force")
    assert outcome.code == 0, outcome.err


def test_one_file_for_several_pictures_is_refused(
    run: Run, says: Says, picture: Path, tmp_path: Path
):
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
    with pytest.raises(PaliGemmaError, match="No space left"):
        picture_files.save_svg("<svg/>", tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


def test_an_svg_is_text_and_never_replaces_unasked(tmp_path: Path):
    path = tmp_path / "new" / "a.svg"
    picture_files.save_svg("<svg>ä</svg>", path)
    with pytest.raises(PaliGemmaError, match="exists already"):
        picture_files.save_svg("<svg/>", path)
    assert path.read_text(encoding="utf-8") == "<svg>ä</svg>"
    picture_files.save_svg("<svg/>", path, force=True)
    assert path.read_text(encoding="utf-8") == "<svg/>"
