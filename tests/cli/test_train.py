"""`paligemma train`: settings, exit codes, and a run that is killed again and again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from paligemma_jax.cli.train import take_settings
from paligemma_jax.training.logging import read_metrics
from tests.cli.conftest import Run

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = """
from tests.training.runs import tiny_run
from paligemma_jax.training.config import parse_arg

def get_config(arg: str = ""):
    return tiny_run(parse_arg(arg, store="").store).to_config()
"""


@pytest.fixture(scope="session")
def config(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return f"{path}:store={store}"


def test_settings_are_told_from_options():
    given = ["train", "--config", "x.py", "--config.a.b=1", "--config.c", "2", "--workdir=w"]
    assert take_settings(given) == [
        "train", "--config", "x.py", "--config.NAME=a.b=1", "--config.NAME=c=2", "--workdir=w",
    ]  # fmt: skip


def test_what_does_not_fit_is_one_message(run: Run, config: str, tmp_path: Path):
    assert run("train", "--workdir", tmp_path).code == 2
    wrong = ["--config.batch_sise=8", "--config.seed=x"]
    outcome = run("train", "--config", config, "--workdir", tmp_path, *wrong)
    assert outcome.code == 1 and not outcome.out
    assert "--config.batch_sise: there is no such setting. Did you mean batch_size?" in outcome.err
    assert "--config.seed: 'x' is text" in outcome.err
    assert not list(tmp_path.iterdir())
    few = run("train", "--config", config, "--workdir", tmp_path, "--config.batch_size=16")
    assert few.code == 1 and "batch of 16" in few.err
    assert re.search(
        r"memory: 0\.\d\d GB a device(.|\n)*optimizer", few.err
    )  # told before it starts
    absent = run("train", "--config", "no.py", "--workdir", tmp_path)
    assert absent.code == 1 and "no configuration 'no'" in absent.err


def test_check_of_data_shows_what_is_wrong(run: Run, image: Path, config: str, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    row = {"image": str(image.name), "prefix": "caption en", "suffix": "noise"}
    (tmp_path / image.name).write_bytes(image.read_bytes())
    data.write_text(json.dumps(row) + "\n")
    options = ["--check", data, "--config", config, "--workdir", tmp_path]
    good = run("train", *options)
    assert good.code == 0 and "No problems found" in good.out and "tokens of" in good.out
    assert (tmp_path / "data_check.png").is_file()
    data.write_text(json.dumps(row) + "\n{oops\n")
    bad = run("train", *options)
    assert bad.code == 1 and "data.jsonl:2" in bad.out


def test_check_and_plan_of_a_mixture(run: Run, image: Path, config: str, tmp_path: Path):
    row = {"image": str(image.name), "prefix": "caption en", "suffix": "noise"}
    (tmp_path / image.name).write_bytes(image.read_bytes())
    for name, count in (("captions", 2), ("boxes", 1)):
        lines = [json.dumps(row | {"suffix": f"noise {i}"}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    captions, boxes = tmp_path / "captions.jsonl", tmp_path / "boxes.jsonl"
    mixture = f"--config.train=Mixture(MixtureComponent({str(captions)!r}, 3.0), "
    mixture += f"MixtureComponent(Data({str(boxes)!r})))"
    given = ["--config", config, mixture, "--workdir", tmp_path]
    good = run("train", "--check", *given)
    assert good.code == 0 and "component 0, 75.0% of the samples" in good.out
    assert "component 1, 25.0% of the samples, each record 0.75 times an epoch" in good.out
    assert re.search(r"total +\d\.\d\d GB a device", run("train", "--plan", *given).out)
    boxes.write_text("{oops\n" + json.dumps(row) + "\n")
    bad = run("train", "--check", *given)
    assert bad.code == 1 and "boxes.jsonl:1" in bad.out
    wrong = run(
        "train", "--check", "--config", config, "--config.train=Mixture(MixtureComponent('x', -1))"
    )
    assert wrong.code == 1 and "number, got -1" in wrong.err
    assert run("train", "--check").code == 2


def test_plan_says_how_much_memory_it_takes(run: Run):
    given = ["--config", CONFIGS / "qlora.py", "--config.mesh=Axes(data=2)", "--plan"]
    outcome = run("train", *given)
    assert outcome.code == 0 and re.search(r"total +\d\d?\.\d\d GB a device", outcome.out)
    assert "16 rows on 2 devices" in outcome.out


def start(config: str, workdir: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "paligemma_jax", "train", "--config", config]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir), *more],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "."},
    )


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        rows = read_metrics(workdir / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.01)


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(workdir / "metrics.jsonl")}


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


@pytest.mark.slow
def test_killed_and_started_again_it_ends_as_if_it_had_never_been(config: str, tmp_path: Path):
    more: Sequence[str] = ["--config.duration=Steps(90)", "--config.checkpoint_every=Steps(7)"]
    out, err = finish(start(config, tmp_path / "whole", *more))
    assert "model: the trained model" in out and re.search(r"step 90/90 loss [\d.]+", err)
    workdir = tmp_path / "killed"
    process = start(config, workdir, *more)
    wait_for_step(workdir, 40, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finish(start(config, workdir, *more))
    assert losses(workdir) == losses(tmp_path / "whole")
    assert len(losses(workdir)) == 90
