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


def test_wrong_settings_are_one_message(run: Run, config: str, tmp_path: Path):
    assert run("train", "--workdir", tmp_path).code == 2
    wrong = ["--config.batch_sise=8", "--config.seed=x"]
    outcome = run("train", "--config", config, "--workdir", tmp_path, *wrong)
    assert outcome.code == 1 and not outcome.out and not list(tmp_path.iterdir())
    assert "--config.batch_sise" in outcome.err and "Did you mean batch_size" in outcome.err
    assert "--config.seed" in outcome.err and "'x'" in outcome.err
    few = run("train", "--config", config, "--workdir", tmp_path, "--config.batch_size=16")
    assert few.code == 1 and "at least 16 records" in few.err
    assert re.search(r"0\.\d\d GB(.|\n)*optimizer", few.err)  # told before it starts
    absent = run("train", "--config", "no.py", "--workdir", tmp_path)
    assert absent.code == 1 and "no configuration 'no.py'" in absent.err


@pytest.fixture
def records(image: Path, tmp_path: Path) -> list[Path]:
    """Two files of records about an image, two records and one."""
    (tmp_path / image.name).write_bytes(image.read_bytes())
    paths = [tmp_path / "captions.jsonl", tmp_path / "boxes.jsonl"]
    for path, count in zip(paths, (2, 1), strict=True):
        row = {"image": image.name, "prefix": "caption en"}
        lines = [json.dumps(row | {"suffix": f"noise {i}"}) + "\n" for i in range(count)]
        path.write_text("".join(lines))
    return paths


def test_check_data(run: Run, records: list[Path], config: str, tmp_path: Path):
    command = ["train", "--check-data", records[0], "--config", config, "--workdir", tmp_path]
    good = run(*command)
    assert good.code == 0 and "No problems found" in good.out and "tokens of" in good.out
    assert (tmp_path / "data_check.png").is_file()
    with records[0].open("a") as file:
        file.write("{oops\n")
    bad = run(*command)
    assert bad.code == 1 and "captions.jsonl:3" in bad.out
    assert run("train", "--check-data").code == 2


def test_check_data_and_memory_of_a_mixture(
    run: Run, records: list[Path], config: str, tmp_path: Path
):
    captions, boxes = map(str, records)
    given = [
        "--config", config, "--workdir", tmp_path, "--config.train=Mixture(MixtureComponent("
        f"{captions!r}, 3.0), MixtureComponent(Data({boxes!r})))",
    ]  # fmt: skip
    good = run("train", "--check-data", *given)
    assert good.code == 0 and "component 0, 75.0%" in good.out
    assert "component 1, 25.0%" in good.out and "0.75 times an epoch" in good.out
    assert re.search(r"total +\d\.\d\d GB", run("train", "--estimate-memory", *given).out)
    records[1].write_text("{oops\n" + records[1].read_text())
    bad = run("train", "--check-data", *given)
    assert bad.code == 1 and "boxes.jsonl:1" in bad.out
    wrong = "--config.train=Mixture(MixtureComponent('x', -1))"
    outcome = run("train", "--check-data", "--config", config, wrong)
    assert outcome.code == 1 and "-1" in outcome.err


def test_estimate_memory_on_several_devices(run: Run):
    given = ["--config", "qlora", "--config.mesh=Axes(data=2)", "--estimate-memory"]
    outcome = run("train", *given)
    assert outcome.code == 0 and re.search(r"total +\d\d?\.\d\d GB", outcome.out)
    assert "2 devices, each" in outcome.out


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
