"""Help, wrong usage, and how commands end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import paligemma_jax
from tests.cli.conftest import Run

COMMANDS = (
    "caption", "answer", "ocr", "count", "generate", "text", "detect", "segment", "classify",
    "score", "mask", "convert", "quantize", "info", "models", "download", "bench", "demo",
)  # fmt: skip
COMMAND = [sys.executable, "-m", "paligemma_jax"]


def test_alone_it_prints_help(run: Run):
    outcome = run()
    assert outcome.code == 0
    assert all(f"\n    {name} " in outcome.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(run: Run, name: str):
    outcome = run(name, "--help")
    assert outcome.code == 0 and f"\n  paligemma {name}" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 100


def test_help_loads_nothing_heavy():
    program = """
import sys, time
start = time.process_time()
from paligemma_jax.cli import main
try:
    main(["caption", "--help"])
except SystemExit:
    pass
seconds = time.process_time() - start
heavy = {"jax", "flax", "numpy", "PIL", "tqdm", "sentencepiece"} & set(sys.modules)
sys.exit(f"{heavy} {seconds}" if heavy or seconds > 0.3 else 0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_version(run: Run):
    assert run("--version").out == f"paligemma {paligemma_jax.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["captoin", "a.png"], "captoin"),
        (["caption"], "PICTURE"),
        (["answer", "a.png"], "QUESTION"),
        (["caption", "-", "-"], "one picture only"),
        (["generate", "a.png", "ocr", "--temperature", "-1"], "temperature"),
        (["generate", "a.png", "ocr", "--temperature", "nan"], "temperature"),
        (["generate", "a.png", "ocr", "--seed", "x"], "whole number"),
        (["caption", "a.png", "--max-new-tokens", "0"], "whole number"),
        (["caption", "a.png", "--max-new-tokens", "9999999"], "8,192"),
        (["caption", "a.png", "--dtype", "int3"], "int3"),
        (["caption", "a.png", "--quantize", "int3"], "int3"),
        (["detect", "a.png", "cat", "--min-score", "2"], "from 0 to 1"),
        (["detect", "a.png", "cat", "--min-score", "nan"], "from 0 to 1"),
        (["detect", "a.png", "cat", "--max-overlap", "0"], "above 0"),
        (["segment", "a.png", "cat", "--max-objects", "0"], "whole number"),
        (["classify", "a.png"], "LABELS"),
        (["answer", "a.mp4", "why?", "--frames", "0"], "whole number"),
        (["mask"], "--prompt"),
        (["mask", "--prompt", "ocr", "--images", "-1"], "whole number"),
        (["info"], "--list"),
        (["convert", "a.npz"], "TARGET"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, argv: list[str], words: str):
    outcome = run(*argv)
    assert outcome.code == 2 and outcome.out == "" and words in outcome.err


def test_question_before_the_picture_is_noticed(run: Run, picture: Path):
    outcome = run("answer", "what is it?", picture)
    assert outcome.code == 2 and "pictures come first" in outcome.err


def test_words_among_the_pictures_are_noticed(run: Run, says, picture: Path):
    says("")
    outcome = run("detect", picture, "cat", "dog")
    assert outcome.code == 1 and "in quotes" in outcome.err


def test_debug_shows_where_an_error_comes_from(run: Run):
    with pytest.raises(paligemma_jax.CheckpointError):
        run("info", "no-such-model", "--debug")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, "not enough memory"),
    ],
)
def test_ends_with_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, picture: Path, error: BaseException, code: int,
    words: str,
):  # fmt: skip
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("paligemma_jax.cli.output.load_pipeline", fail)
    outcome = run("caption", picture)
    assert outcome.code == code and words in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_defects_of_ours_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch, picture: Path):
    monkeypatch.setattr("paligemma_jax.cli.output.load_pipeline", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("caption", picture)


def test_reader_that_stops_reading_is_no_error():
    with subprocess.Popen(
        [*COMMAND, "info", "--list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_as_a_user_runs_it(store: Path, picture: Path, tmp_path: Path):
    """A picture through a pipe, from another directory, in a locale without any letters but ASCII.

    The second time the compiled programs are there already.
    """
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(paligemma_jax.__file__).parents[1]),
        "PYTHONIOENCODING": "ascii",
    }
    command = [*COMMAND, "caption", "-", "--json", "--model", str(store), "--max-new-tokens", "3"]
    answers = []
    for _ in range(2):
        with picture.open("rb") as file:
            result = subprocess.run(
                command, stdin=file, capture_output=True, cwd=tmp_path, env=environment
            )
        assert result.returncode == 0, result.stderr
        assert result.stderr == b""
        answers.append(json.loads(result.stdout))
    assert answers[0] == answers[1]
    assert answers[0]["file"] == "-" and len(answers[0]["tokens"]) <= 3
    kept = list((tmp_path / "cache" / "paligemma-jax").rglob("*-cache"))
    assert kept and max(path.stat().st_mtime for path in kept) <= time.time()
