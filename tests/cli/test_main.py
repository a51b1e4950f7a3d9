"""Help, wrong usage, and how commands end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import paligemma_jax
from tests.cli.conftest import Run

COMMANDS = (
    "caption", "answer", "ocr", "count", "generate", "text", "detect", "segment", "classify",
    "score", "attention-mask", "convert", "quantize", "train", "info", "models", "download",
    "eval", "bench", "demo",
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


def test_help_and_wrong_usage_load_nothing_heavy():
    program = """
import sys, time
start = time.process_time()
from paligemma_jax.cli import main
for argv in (["caption", "--help"], ["generate", "a.png", "ocr", "--top-k", "x"]):
    try:
        main(argv)
    except SystemExit:
        pass
seconds = time.process_time() - start
heavy = {"jax", "flax", "numpy", "PIL", "tqdm", "sentencepiece"} & set(sys.modules)
sys.exit(f"{heavy} {seconds}" if heavy or seconds > 0.4 else 0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_version(run: Run):
    assert run("--version").out == f"paligemma {paligemma_jax.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["captoin", "a.png"], "captoin"),
        (["caption"], "IMAGE"),
        (["answer", "a.png"], "QUESTION"),
        (["caption", "-", "-"], "one image"),
        (["generate", "a.png", "ocr", "--temperature", "x"], "--temperature"),
        (["caption", "a.png", "--batch-size", "0"], "at least 1"),
        (["caption", "a.png", "--mesh", "tensor"], "data, fsdp and tensor"),
        (["caption", "a.png", "--mesh", "model=2"], "data, fsdp and tensor"),
        (["detect", "a.png", "cat", "--min-score", "2"], "from 0 to 1"),
        (["detect", "a.png", "cat", "--nms-iou", "nan"], "from 0 to 1"),
        (["attention-mask"], "--prompt"),
        (["attention-mask", "--prompt", "ocr", "--images", "-1"], "at least 0"),
        (["info"], "MODEL"),
        (["score", "a.png", "ocr"], "--candidates"),
        (["caption", "a.png", "--stream", "--best-of", "2"], "not allowed with"),
        (["caption", "a.png", "--num-beams", "2", "--best-of", "2"], "not allowed with"),
        (["caption", "a.png", "--stream", "--json"], "--json"),
        (["count", "a.png", "cats", "--stream"], "count"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, argv: list[str], word: str):
    outcome = run(*argv)
    assert outcome.code == 2 and outcome.out == "" and word in outcome.err


def test_mixed_up_arguments_are_noticed(run: Run, image: Path):
    for argv in (["answer", "what is it?", image], ["score", "ocr", image, "--candidates", "A"]):
        outcome = run(*argv)
        assert outcome.code == 2 and "images come first" in outcome.err
    outcome = run("text", image)
    assert outcome.code == 2 and "paligemma generate" in outcome.err
    outcome = run("detect", "cat", "dog", "--model", "no-model")
    assert outcome.code == 1 and "in quotes" in outcome.err


def test_debug_shows_where_an_error_comes_from(run: Run):
    with pytest.raises(paligemma_jax.CheckpointError):
        run("info", "no-such-model", "--debug")


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, "--batch-size 1"),
        (ZeroDivisionError(), None, "a bug of ours is not hidden"),
    ],
)
def test_ends_with_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, image: Path, error: BaseException, code: int | None,
    word: str,
):  # fmt: skip
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("paligemma_jax.loading.from_pretrained", fail)
    if code is None:
        with pytest.raises(type(error)):
            run("caption", image)
        return
    outcome = run("caption", image)
    assert outcome.code == code and word in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_closed_pipe_is_no_error():
    with subprocess.Popen(
        [*COMMAND, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_as_a_user_runs_it(image: Path, tmp_path: Path):
    """An image through a pipe, another directory, an ASCII locale, and text as it comes."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(paligemma_jax.__file__).parents[1]),
        "PYTHONIOENCODING": "ascii",
    }
    command = [*COMMAND, "generate", "-", "caption es", "--stream", "--max-new-tokens", "512"]
    with (
        image.open("rb") as file,
        subprocess.Popen(
            [*command, "--min-new-tokens", "300"], stdin=file, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
        ) as process,
    ):  # fmt: skip
        assert process.stdout and process.stderr
        first = process.stdout.read(1)
        assert first, process.stderr.read()
        assert process.poll() is None
        process.terminate()
