"""The command's lines, its JSON, its files, and what it says without data."""

import json
from pathlib import Path

import pytest
from PIL import Image

from paligemma_jax.demo.evaluate import GOALS, Result
from tests.cli.conftest import Run, Says


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "a.png")
    rows = [
        {"id": i, "image": "a.png", "question": f"what colour is {i}?", "answer": "blue"}
        for i in range(3)
    ]
    (tmp_path / "gqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_list(run: Run):
    lines = run("eval", "--list").out
    assert "docvqa" in lines and "DocVQA (Mathew et al. 2021): anls" in lines
    described = run("eval", "--list", "--task", "textcaps").out
    for said in ("textcaps.jsonl", '"captions"', "3 beams", "paligemma-3b-448 153.94"):
        assert said in described
    assert "needs no data" in run("eval", "--list", "--task", "demo").out


def test_figures_and_files(run: Run, says: Says, data: Path):
    calls = says("blue", "red", "blue")
    out = data / "out"
    done = run("eval", "--task", "gqa", "--data", data, "--out", out, "--batch-size", "2")
    assert done.code == 0, done.err
    first, *rest = done.out.splitlines()
    assert first.startswith("GQA: acc 66.67 (")
    assert "    paligemma-3b-224     65.61" in done.out
    assert [Path(line).name for line in rest[-3:]] == ["metrics.json", "report.html", "server.json"]
    assert calls == [[f"answer en what colour is {i}?" for i in range(3)]]
    # All is there: the model is not asked again.
    again = run("eval", "--task", "gqa", "--data", data, "--out", out, "--json")
    assert json.loads(again.out) == json.loads((out / "metrics.json").read_text())
    other = run("eval", "--task", "gqa", "--data", data, "--out", out, "--prompt", "{question}")
    assert other.code == 1 and "Choose another folder: --out FOLDER" in other.err


def test_without_task_or_data(run: Run, tmp_path: Path):
    assert run("eval").code == 2
    assert "made of its labels" in run("eval", "--task", "detection", "--prompt", "x").err
    asked = run("eval", "--task", "docvqa")
    assert asked.code == 1 and "docvqa.jsonl" in asked.err and "--data FOLDER" in asked.err
    assert "is not there" in run("eval", "--task", "docvqa", "--data", tmp_path).err
    assert "no benchmark 'doc'" in run("eval", "--task", "doc", "--data", tmp_path).err


def test_demo(run: Run, says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    says()
    results = {name: Result(0.75, 20) for name in GOALS}
    monkeypatch.setattr(
        "paligemma_jax.evaluation.benchmarks.demo.evaluate", lambda pipeline, seed, count: results
    )
    shown = run("eval", "--task", "demo", "--limit", "3", "--out", tmp_path)
    assert "| answers | 75.0 % | 95 % | 20 |" in shown.out
    assert "3 scenes of seed 2026" in shown.out
    kept = json.loads((tmp_path / "metrics.json").read_text())
    answers = kept["figures"]["answers"]
    assert answers["value"] == 0.75 and answers["low"] < 0.75 < answers["high"]
    assert kept["figures"]["segmentation mean IoU"] == {"value": 0.75, "prompts": 20, "goal": 0.75}
