"""Numbers of a run: lines, event files, curve, report and progress."""

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paligemma_jax.errors import MissingExtraError
from paligemma_jax.training.logging import (
    JsonLines,
    TensorBoard,
    WeightsAndBiases,
    progress_display,
    read_metrics,
    training_flops,
)
from paligemma_jax.training.report import draw_curve, write_report
from tests.tiny import tiny_config


def test_lines_after_the_step_that_is_gone_on_from_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for step in (1, 2, 3):
        first.write(step, {"loss": 0.1 + step, "other": math.nan})
    first.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')  # killed while writing
    second = JsonLines(path, after=2)
    second.write(3, {"loss": 7.0})
    second.close()
    rows = read_metrics(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.1), (2, 2.1), (3, 7.0)]
    assert math.isnan(rows[0]["other"])
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_event_files(tmp_path: Path):
    pytest.importorskip("tensorboardX", reason="the extra train is not installed")
    board = TensorBoard(tmp_path)
    board.write(1, {"loss": 0.5})
    board.close()
    assert b"loss" in next(tmp_path.glob("events.*")).read_bytes()


def test_reports_of_a_run_that_goes_on_are_of_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"paligemma-jax\[wandb\]"):
        WeightsAndBiases(tmp_path, "birds", {})
    begun: list[dict[str, Any]] = []
    run = SimpleNamespace(finish=lambda: None)
    stub = SimpleNamespace(init=lambda **about: begun.append(about) or run)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for _ in range(2):
        WeightsAndBiases(tmp_path, "birds", {"seed": "1"}).close()
    assert begun[0] == begun[1] and begun[0]["resume"] == "allow" and begun[0]["id"]
    assert (begun[0]["project"], begun[0]["config"]) == ("birds", {"seed": "1"})


@pytest.mark.parametrize(
    "values", [[], [1.0], [3.0, 2.5, 2.0] * 50, [100.0, 1.0, 0.01], [-1.0, 1.0]]
)
def test_curve_is_drawn_of_any_losses(values: list[float]):
    points = [(i + 1, value) for i, value in enumerate([*values, math.nan, math.inf])]
    picture = draw_curve(points, points[::2])
    assert picture.size == (960, 480) and len(picture.getcolors(1 << 16) or [0] * 3) > 2


def test_report_is_one_page_that_shows_everything_and_is_no_program(tmp_path: Path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "validation_loss": 1.5}]
    write_report(tmp_path, rows, {"model": "<script>"}, {"run": "finished"})
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;" in page and "<script>" not in page
    assert "validation_loss" in page and "data:image/png;base64," in page
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_flops_of_an_example():
    config = tiny_config()
    tokens = config.img.num_patches + 16
    weights = 3 * config.llm.width * config.llm.mlp_dim * config.llm.depth
    whole = training_flops(config, 16)
    assert whole > 6 * weights * tokens
    frozen = training_flops(config, 16, image_trained=False, text_trained=False)
    assert frozen < whole < 3.01 / 2 * frozen * 1.5


def test_time_left_is_that_of_later_steps(capsys: pytest.CaptureFixture[str]):
    with progress_display(bar=True) as update:
        time.sleep(0.5)  # compilation
        for step in range(101, 104):
            update(step, 200, {"loss": 0.25})
            time.sleep(0.15)
    shown = capsys.readouterr().err.split("\r")
    assert "103/200" in shown[-1] and "loss 0.25" in shown[-1]
    left = shown[-1].split("<")[1].split(",")[0]
    assert "00:05" < left < "00:45", shown[-1]
