"""`paligemma quantize`: what it writes, its report of a random model, and how scores are told."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.cli import checkpoint_commands as quantize
from paligemma_jax.evaluation.quantization_report import Agreement, QuantizationReport, Variant
from paligemma_jax.models.paligemma import flatten, to_params
from tests.cli.conftest import Run


def test_report(run: Run, store: Path):
    argv = ["quantize", store, "--report", "--quantization", "int4", "--prompts", "3"]
    outcome = run(*argv, "--dtype", "float32", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["dtype"] == "float32" and found["scenes"] == 0
    before, after = found["variants"]["before"], found["variants"]["int4"]
    assert before["agreement"] is None and before["scores"] == {}
    assert after["text_nbytes"] < before["text_nbytes"] / 2
    assert before["nbytes"] - after["nbytes"] == before["text_nbytes"] - after["text_nbytes"]
    assert after["agreement"]["divergence"] > 0 and after["agreement"]["tokens"] > 3
    assert 0 < after["agreement"]["top1_agreement"] <= 1 and after["tokens_per_second"] > 0


def test_it_writes_what_convert_writes(run: Run, store: Path, tmp_path: Path):
    quantization = "attention=int8,mlp=int4:8,image=float8"
    for argv in (
        ["quantize", store, tmp_path / "a", "--quantization", quantization, "--verify"],
        ["convert", store, tmp_path / "b", "--quantize", quantization],
    ):
        outcome = run(*argv)
        assert outcome.code == 0, outcome.err
        assert "int8" in outcome.out and "int4" in outcome.out and "float8" in outcome.out
    manifests = [json.loads((tmp_path / n / "MANIFEST.json").read_text()) for n in "ab"]
    assert manifests[0]["arrays"] == manifests[1]["arrays"]
    outcome = run("info", tmp_path / "a", "--check")
    assert (
        "attention int8; mlp int4 in groups of 8; embedding as trained; image float8" in outcome.out
    )
    assert "kB of scales" in outcome.out and "as it was written" in outcome.out
    found = json.loads(run("info", tmp_path / "a", "--json").out)["checkpoint"]
    assert found["quantization"]["mlp"] == "int4:8" and found["scale_bytes"] > 0
    outcome = run("convert", tmp_path / "a", tmp_path / "c", "--to", "huggingface")
    assert outcome.code == 1 and "--to huggingface --dequantize" in outcome.err
    assert not (tmp_path / "c").exists()


@pytest.fixture
def data(tmp_path: Path, picture: Path) -> Path:
    """Five records about one picture."""
    shutil.copy(picture, tmp_path / "noise.png")
    lines = [
        {"image": "noise.png", "prefix": "caption en", "suffix": f"a dot and {n} lines"}
        for n in range(5)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_calibrated_weights_are_stored(run: Run, store: Path, data: Path, tmp_path: Path):
    target = tmp_path / "small"
    argv = [
        "--calibrate",
        data,
        "--quantization",
        "int4:8",
        "--batch-size",
        "2",
        "--dtype",
        "float32",
    ]
    outcome = run("quantize", store, target, *argv, "--progress")
    assert outcome.code == 0, outcome.err
    assert "4/4" in outcome.err and "int4" in outcome.out
    assert "calibrated on data.jsonl" in run("info", target).out
    found = pg.from_pretrained(target, dtype="float32").model
    whole = pg.from_pretrained(store, dtype="float32")
    wanted = pg.calibrate(whole, data, "int4:8", batch_size=2).model
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    plain = pg.quantize(whole.model, "int4:8")
    path = "llm/layers/0/mlp/down/matrix/values"
    values = [flatten(to_params(model))[path] for model in (found, plain)]
    assert 0 < np.mean(values[0] != values[1]) < 0.9


def test_what_calibration_is_for(run: Run, store: Path, data: Path, tmp_path: Path):
    argv = ["quantize", store, tmp_path / "small", "--calibrate", data]
    outcome = run(*argv, "--quantization", "int8")
    assert outcome.code == 1 and "--quantization int4" in outcome.err
    data.write_text('{"prefix": "caption en", "suffix": "nothing"}\n')
    assert run(*argv).code == 1
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_calibrated_weights_are_closer(run: Run):
    argv = [
        "quantize",
        "demo",
        "--report",
        "--quantization",
        "int4",
        "--scenes",
        "0",
        "--prompts",
        "64",
    ]
    outcome = run(*argv, "--dtype", "float32", "--calibration-prompts", "64", "--json")
    assert outcome.code == 0, outcome.err
    forms = json.loads(outcome.out)["variants"]
    plain, calibrated = (forms[name] for name in ("int4", "int4 calibr."))
    assert calibrated["nbytes"] == plain["nbytes"]
    divergences = [form["agreement"]["divergence"] for form in (calibrated, plain)]
    assert divergences[0] < 0.8 * divergences[1] < 0.015


def _form(agreement: Agreement | None, **scores: float) -> Variant:
    return Variant(2_000_000, 1_000_000, 12.34, agreement, scores)


def test_scores():
    forms = {
        "before": _form(None, counts=0.99, masks=0.80),
        "int8": _form(Agreement(0.00012, 0.999, 10), counts=0.986, masks=0.81),
        "int4": _form(Agreement(0.0123, 0.95, 10), counts=0.96, masks=0.79),
    }
    found = QuantizationReport("bfloat16", 500, forms)
    assert found.losses("int4") == pytest.approx({"counts": 3, "masks": 1})
    assert found.to_dict()["variants"]["int8"]["largest_loss"] == pytest.approx(0.4)
    lines = {line[:26].strip(): line[26:].split() for line in quantize._lines("demo", found)}
    assert lines["KL"] == ["0.00012", "0.01230"] and lines["weights"] == ["2", "MB"] * 3
    assert lines["counts"] == ["99.0", "%", "98.6", "%", "96.0", "%"]
    assert lines["largest loss, points"] == ["0.4", "3.0"]
    assert lines["reached"] == ["yes", "no"]


def test_wrong_usage(run: Run, store: Path):
    assert "TARGET" in run("quantize", "demo").err
    for argv in (
        ["quantize", "demo"],
        ["quantize", "demo", "target", "--report"],
        ["quantize", "demo", "target", "--quantization", "int8", "--quantization", "int4"],
        ["quantize", "demo", "target", "--quantization", "mlp=int3"],
        ["quantize", "demo", "--report", "--calibrate", "data.jsonl"],
    ):
        assert run(*argv).code == 2
    outcome = run("quantize", store, store, "--calibrate", "data.jsonl")
    assert outcome.code == 1 and "exists already" in outcome.err
    assert run("quantize", "demo", "--report", "--prompts", "0").code == 2
