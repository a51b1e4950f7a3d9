"""Files are written whole or not at all, and never over others."""

import json
from pathlib import Path

import pytest
from PIL import Image

from paligemma_jax.cli.files import DrawingFiles, file_name_part, save_image, write_whole
from paligemma_jax.errors import PaliGemmaError
from tests.cli.conftest import Run, Says

ONE = "<loc0000><loc0000><loc1023><loc0512> cat"


def test_several_images_go_into_a_directory(run: Run, says: Says, image: Path, tmp_path: Path):
    other = tmp_path / "other.jpg"
    Image.open(image).save(other)
    says(*[ONE] * 4)
    command = ["detect", image, other, image, "cat", "--out", tmp_path / "boxes", "--force"]
    assert run(*command).code == 0
    assert sorted(p.name for p in (tmp_path / "boxes").iterdir()) == ["noise.png", "other.png"]
    outcome = run("detect", image, "other.png", "cat", "--out", tmp_path / "boxes.png")
    assert outcome.code == 1 and "expected a directory" in outcome.err


@pytest.mark.parametrize("option", ["--out", "--attention-map"])
@pytest.mark.parametrize(
    "out", ["taken.png", "noise.txt", "noise", "taken.png/inside.png", f"{'long' * 99}.png"]
)
def test_unwritable_targets_are_refused_before_any_work(
    run: Run, says: Says, image: Path, tmp_path: Path, option: str, out: str
):
    (tmp_path / "taken.png").write_text("mine")
    calls = says()
    outcome = run("detect", image, "cat", option, tmp_path / out)
    assert outcome.code == 1 and outcome.err.startswith("paligemma: error: ")
    assert option in outcome.err and not calls
    assert [p.name for p in tmp_path.iterdir()] == ["taken.png"]
    assert (tmp_path / "taken.png").read_text() == "mine"


def test_force_replaces(run: Run, says: Says, image: Path, tmp_path: Path):
    (tmp_path / "taken.png").write_text("old")
    says(ONE)
    assert run("detect", image, "cat", "--out", tmp_path / "taken.png", "--force").code == 0
    assert Image.open(tmp_path / "taken.png").size == (100, 50)


def test_images_of_one_name_are_refused(run: Run, says: Says, image: Path, tmp_path: Path):
    (tmp_path / "noise.png").write_bytes(image.read_bytes())
    calls = says()
    for command in (["detect", "--out"], ["detect", "--attention-map"], ["segment", "--masks"]):
        arguments = [image, tmp_path / "noise.png", "cat", command[1], tmp_path / "boxes"]
        outcome = run(command[0], *arguments)
        assert outcome.code == 1 and "different file names" in outcome.err and not calls


def test_two_outputs_cannot_be_one_file(run: Run, says: Says, image: Path, tmp_path: Path):
    calls, out = says(), tmp_path / "a.png"
    outcome = run("detect", image, "cat", "--out", out, "--attention-map", out, "--force")
    assert outcome.code == 1 and "written twice" in outcome.err and not calls


def test_names_of_standard_input_and_urls(tmp_path: Path):
    names = ["-", "https://example.org/a/cat.jpg?size=2"]
    files = DrawingFiles(f"{tmp_path}/new/", names, option="--out", force=False)
    assert [path.name for path in files.paths.values()] == ["stdin.png", "cat.png"]


@pytest.mark.parametrize(
    ("label", "part"),
    [("cat", "cat"), ("Red  Café?", "Red-Cafe"), ("../../etc/passwd", "etc-passwd"),
     ("猫", "object"), ("", "object"), ("a" * 99, "a" * 60), ("NUL:*", "NUL")],
)  # fmt: skip
def test_labels_are_safe_in_names(label: str, part: str):
    assert file_name_part(label) == part


def test_a_failed_write_is_reported_and_the_others_go_on(
    run: Run, says: Says, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "other.png"
    other.write_bytes(image.read_bytes())
    says(ONE, ONE)
    real = Image.Image.save

    def save(image: Image.Image, file: object, *args: object, **kwargs: object) -> None:
        monkeypatch.setattr(Image.Image, "save", real)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    out = tmp_path / "boxes"
    outcome = run("detect", image, other, "cat", "--out", out, "--json")
    first, second = map(json.loads, outcome.out.splitlines())
    assert outcome.code == 1 and "No space left" in first["error"] and first["text"] == ONE
    assert second["out"] == str(out / "other.png")
    assert [path.name for path in out.iterdir()] == ["other.png"]


def test_a_failed_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    image, path = Image.new("RGB", (4, 4)), tmp_path / "a.png"
    with pytest.raises(PaliGemmaError, match="No space left"):
        save_image(image, path, option="--out", force=False)
    with pytest.raises(PaliGemmaError, match="No space left"):
        write_whole(tmp_path / "a.svg", lambda file: file.write(b"<svg/>"), "--out")
    assert not list(tmp_path.iterdir())
