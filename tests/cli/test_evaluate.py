"""The command's lines, its JSON, its files, and what it says without data."""

import json
from pathlib import Path

import pytest
from PIL import Image

from paligemma_jax.evaluation.demo import ANSWERS, COUNTS, OCR, SAME, TARGETS, demo_examples
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


def test_scores_and_files(run: Run, says: Says, data: Path):
    calls = says("blue", "red", "blue")
    out = data / "out"
    done = run("eval", "--task", "gqa", "--data", data, "--out", out, "--batch-size", "2")
    assert done.code == 0, done.err
    first, *rest = done.out.splitlines()
    assert first.startswith("GQA: acc 66.67 (")
    assert "    paligemma-3b-224     65.61" in done.out
    names = [Path(line).name for line in rest[-3:]]
    assert names == ["metrics.json", "report.html", "submission.json"]
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
    assert "is missing" in run("eval", "--task", "docvqa", "--data", tmp_path).err
    assert "no evaluation task 'doc'" in run("eval", "--task", "doc", "--data", tmp_path).err


def test_demo(run: Run, says: Says, tmp_path: Path):
    examples = demo_examples(1)
    calls = says(*["yes"] * len(examples))
    shown = run("eval", "--task", "demo", "--limit", "1", "--out", tmp_path)
    assert shown.code == 0, shown.err
    right = [e.reference == "yes" for e in examples if SAME in e.groups]
    assert f"| same or different | {100 * sum(right):.1f} % | 95 % | 1 |" in shown.out
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert (
        kept["scores"].keys() >= {*TARGETS} - {OCR, COUNTS, ANSWERS}
        and kept["counts"]["num/caption de"] == 1
    )
    assert kept["scores"]["segmentation mean IoU"] == {"value": 0, "low": 0, "high": 0}
    assert kept["model_card"]["ocr exact"] == 99.2
    asked = len(calls)
    assert asked == 4  # kind by kind: words, pairs, boxes of one name or two, masks
    assert run("eval", "--task", "demo", "--limit", "1", "--out", tmp_path).out == shown.out
    assert len(calls) == asked
    assert "leave --num-beams out" in run("eval", "--task", "demo", "--num-beams", "2").err
    other = run("eval", "--task", "demo", "--limit", "1", "--out", tmp_path, "--quantize", "int8")
    assert "quantize was None and is 'int8'" in other.err


def test_shards_of_several_processes(run: Run, says: Says, data: Path):
    says("blue", "blue", "red")
    out, single = data / "out", data / "single"
    common = ("eval", "--task", "gqa", "--data", data)
    first = run(*common, "--out", out, "--shard", "0/2")
    assert "shard 0 of 2 is done: 2 examples" in first.out and "1 still to answer" in first.out
    assert not (out / "metrics.json").exists()
    last = run(*common, "--out", out, "--shard", "1/2")
    assert last.out.startswith("GQA: acc 66.67 (")
    says("blue", "red", "blue")
    run(*common, "--out", single)
    together, alone = (json.loads((f / "metrics.json").read_text()) for f in (out, single))
    assert together["counts"] == alone["counts"] and together["value"] == alone["value"]
    assert run(*common, "--shard", "0/2").code == 2
    assert "expected I/N" in run(*common, "--out", out, "--shard", "2/2").err


def test_a_mesh(run: Run, store: Path, data: Path):
    command = ["eval", "--task", "gqa", "--data", data, "--model", store, "--batch-size", "1"]
    done = run(*command, "--mesh", "data=2", "--max-new-tokens", "4")
    assert done.code == 0 and done.out.startswith("GQA: acc"), done.err
