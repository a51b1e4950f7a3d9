"""`paligemma quantize --report`: of a random model without scores, and how scores are told."""

import json
from pathlib import Path

import pytest

from paligemma_jax.cli import quantize
from paligemma_jax.demo.agreement import Agreement
from paligemma_jax.demo.quantization_report import Measured, QuantizationReport
from tests.cli.conftest import Run


def test_report(run: Run, store: Path):
    argv = ["quantize", store, "--report", "--recipe", "int4", "--prompts", "3"]
    outcome = run(*argv, "--dtype", "float32", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["dtype"] == "float32" and found["scenes"] == 0
    before, after = found["forms"]["before"], found["forms"]["int4"]
    assert before["agreement"] is None and before["scores"] == {}
    assert after["text_nbytes"] < before["text_nbytes"] / 2
    assert before["nbytes"] - after["nbytes"] == before["text_nbytes"] - after["text_nbytes"]
    assert after["agreement"]["divergence"] > 0 and after["agreement"]["tokens"] > 3
    assert 0 < after["agreement"]["same_token"] <= 1 and after["tokens_per_second"] > 0


@pytest.mark.slow
def test_calibrated_weights_are_closer(run: Run):
    argv = ["quantize", "demo", "--report", "--recipe", "int4", "--scenes", "0", "--prompts", "64"]
    outcome = run(*argv, "--dtype", "float32", "--calibrate", "64", "--json")
    assert outcome.code == 0, outcome.err
    forms = json.loads(outcome.out)["forms"]
    plain, calibrated = (forms[name] for name in ("int4", "int4 calibr."))
    assert calibrated["nbytes"] == plain["nbytes"]
    divergences = [form["agreement"]["divergence"] for form in (calibrated, plain)]
    assert divergences[0] < 0.8 * divergences[1] < 0.015


def _form(agreement: Agreement | None, **scores: float) -> Measured:
    return Measured(2_000_000, 1_000_000, 12.34, agreement, scores)


def test_scores():
    forms = {
        "before": _form(None, counts=0.99, masks=0.80),
        "int8": _form(Agreement(0.00012, 0.999, 10), counts=0.986, masks=0.81),
        "int4": _form(Agreement(0.0123, 0.95, 10), counts=0.96, masks=0.79),
    }
    found = QuantizationReport("bfloat16", 500, forms)
    assert found.losses("int4") == pytest.approx({"counts": 3, "masks": 1})
    assert found.to_dict()["forms"]["int8"]["largest_loss"] == pytest.approx(0.4)
    lines = {line[:26].strip(): line[26:].split() for line in quantize._lines("demo", found)}
    assert lines["KL"] == ["0.00012", "0.01230"] and lines["weights"] == ["2", "MB"] * 3
    assert lines["counts"] == ["99.0", "%", "98.6", "%", "96.0", "%"]
    assert lines["largest loss, points"] == ["0.4", "3.0"]
    assert lines["reached"] == ["yes", "no"]


def test_wrong_usage(run: Run):
    assert run("quantize", "demo").code == 2
    assert run("quantize", "demo", "--report", "--prompts", "0").code == 2
