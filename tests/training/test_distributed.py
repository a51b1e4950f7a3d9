"""`paligemma train --distributed`: two processes on this machine, killed, stopped and gone on."""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.models.lora import TRAINABLE, LoRA
from paligemma_jax.models.sharding import Axes
from paligemma_jax.training.logging import read_metrics
from paligemma_jax.training.optimizer import Steps
from paligemma_jax.training.trainer import Progress, train
from paligemma_jax.weights.safetensors_io import read_header
from tests.training.runs import stored_weights, tiny_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = """
from tests.training.runs import stored_weights, tiny_run
from paligemma_jax.training.config import parse_arg

def get_config(arg: str = ""):
    return tiny_run(parse_arg(arg, store="").store).to_config()
"""
TOGETHER = Axes(data=2)  # a device each
STEPS = "--config.duration=Steps(40)", "--config.checkpoint_every=Steps(6)"
ENDLESS = "--config.duration=Steps(100000)", "--config.checkpoint_every=Steps(100000)"
HEAD = "img/head/kernel"
# Softmax cancels it, so that its gradient is nothing but rounding, which Adam makes large.
ROUNDING = "img/blocks/attn/k/bias"


@pytest.fixture(scope="module")
def config(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return f"{path}:store={store}"


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


class Both:
    """Two processes of one device each."""

    def __init__(self, config: str, workdir: Path, *more: str, mesh: Axes = TOGETHER):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
        flags.append("--xla_force_host_platform_device_count=1")
        command = [sys.executable, "-m", "paligemma_jax", "train", "--config", config]
        command += ["--workdir", str(workdir), f"--config.mesh={mesh}", *more]
        self.workdir = workdir
        self.processes = [
            subprocess.Popen(
                [*command, "--distributed", f"{address},{number},2"],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)},
            )
            for number in range(2)
        ]

    def wait_for(self, step: int) -> "Both":
        until = time.monotonic() + 120
        while max(losses(self.workdir), default=0) < step:
            assert time.monotonic() < until and self.processes[0].poll() is None, self.end()
            time.sleep(0.01)
        return self

    def signal(self, number: signal.Signals, *which: int) -> "Both":
        for index in which:
            self.processes[index].send_signal(number)
        return self

    def end(self) -> list[tuple[int, str, str]]:
        """Exit code, output and errors of each."""
        ended = []
        for process in self.processes:
            out, err = process.communicate(timeout=200)  # JAX misses a process after 100
            ended.append((process.returncode, out, err))
        return ended

    def succeed(self) -> list[str]:
        """What they have printed."""
        ended = self.end()
        assert [code for code, _, _ in ended] == [0, 0], ended
        return [out for _, out, _ in ended]


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(workdir / "metrics.jsonl")}


def weights(workdir: Path) -> dict[str, np.ndarray]:
    return stored_weights(workdir / "model")


def assert_close(workdir: Path, expected: Path) -> None:
    found, wanted = losses(workdir), losses(expected)
    assert list(found) == list(wanted)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)
    after, like = weights(workdir), weights(expected)
    assert after.keys() == like.keys()
    for name in like.keys() - {ROUNDING}:
        np.testing.assert_allclose(after[name], like[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def whole(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    first, second = Both(config, workdir, *STEPS).succeed()
    assert f"{workdir}/model: the trained model" in first and "model" not in second
    return workdir


def test_both_compute_and_write_what_one_does(config: str, store: Path, tmp_path: Path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    Both(config, together).succeed()
    result = train(tiny_run(store, mesh=TOGETHER), alone)
    assert result.finished
    assert_close(together, alone)
    read = pg.from_pretrained(together / "model", dtype="float32")
    assert read.config == result.load(dtype="float32").config


def test_killed_and_asked_to_stop_they_go_on_as_if_nothing_had_happened(
    config: str, whole: Path, tmp_path: Path
):
    both = Both(config, tmp_path, *STEPS).wait_for(15)
    killed = both.signal(signal.SIGKILL, 0, 1).end()
    assert [code for code, _, _ in killed] == [-signal.SIGKILL] * 2
    both = Both(config, tmp_path, *STEPS).wait_for(25)
    first, _ = both.signal(signal.SIGTERM, 0, 1).succeed()
    step = max(losses(tmp_path))
    assert f"saved at step {step}" in first and 25 <= step < 40
    assert (tmp_path / "checkpoints" / f"step_{step:09d}" / "MANIFEST.json").is_file()
    Both(config, tmp_path, *STEPS).succeed()
    assert losses(tmp_path) == losses(whole)
    after, like = weights(tmp_path), weights(whole)
    assert all(np.array_equal(after[name], like[name]) for name in like)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_one_two_and_one_process_go_on_with_each_others_work(
    config: str, store: Path, whole: Path, tmp_path: Path
):
    def kill(step: int, *_: object) -> None:
        if step == 9:
            raise Killed

    def alone(progress: Progress | None = None) -> None:
        one = tiny_run(store, mesh=TOGETHER, duration=Steps(40), checkpoint_every=Steps(6))
        train(one, tmp_path, progress=progress)

    with pytest.raises(Killed):
        alone(kill)
    # One of them is asked, and both stop.
    first, _ = Both(config, tmp_path, *STEPS).wait_for(15).signal(signal.SIGTERM, 1).succeed()
    assert f"saved at step {max(losses(tmp_path))}" in first
    alone()
    found, wanted = losses(tmp_path), losses(whole)
    assert list(found) == list(wanted)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-3)


def test_weights_in_parts_and_adapters_are_gathered(config: str, store: Path, tmp_path: Path):
    mesh = Axes(tensor=2)  # both have the same rows, and half of most weights
    lora, trainable = LoRA(rank=2), f"{TRAINABLE}|{HEAD}"
    together, alone = tmp_path / "together", tmp_path / "alone"
    more = f"--config.lora={lora}", f"--config.trainable={trainable}"
    first, _ = Both(config, together, *more, mesh=mesh).succeed()
    assert f"{together}/adapter: the adapters alone" in first
    train(tiny_run(store, mesh=mesh, lora=lora, trainable=trainable), alone)
    assert_close(together, alone)
    tensors = [path / "adapter" / "adapter_model.safetensors" for path in (together, alone)]
    found, wanted = map(read_header, tensors)
    assert found.keys() == wanted.keys() and any("lora" not in name for name in found)
    for name in wanted:
        np.testing.assert_allclose(
            found[name].read(), wanted[name].read(), rtol=1e-3, atol=1e-4, err_msg=name
        )


def test_an_error_in_one_process_ends_both_with_its_message(
    config: str, whole: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns("model", "finished.json"))
    # Another program seems to be writing the model.
    (workdir / ".model.unfinished").mkdir()
    held = os.open(workdir / ".model.unfinished", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    started = time.monotonic()
    first, second = Both(config, workdir, *STEPS).end()
    os.close(held)
    assert first[0] == second[0] == 1 and time.monotonic() - started < 100
    assert "paligemma: error: Another process is writing" in first[2]
    assert "ends, since process 0 stopped: Another process is writing" in second[2]
    assert not (workdir / "model").exists()


def test_when_one_is_killed_the_other_does_not_wait_for_it(config: str, tmp_path: Path):
    both = Both(config, tmp_path, *ENDLESS).wait_for(2).signal(signal.SIGKILL, 1)
    first, _ = both.end()
    assert first[0] == 1 and "another process of this run has ended" in first[2]
