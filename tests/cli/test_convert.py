"""convert and quantize: what they say and write, and one clear error for what is no checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.cli.convert import report_lines
from paligemma_jax.evaluation.quantization_report import Agreement, QuantizationReport, Variant
from paligemma_jax.models.paligemma import flatten, to_params
from tests.cli.conftest import Run

GOLDEN = Path(__file__).parents[1] / "golden"
GEMMA_TOKENIZER = GOLDEN / "processing" / "tiny_gemma.model"


def test_convert_to_every_format(run: Run, store: Path, tmp_path: Path):
    for name, options in {
        "new": ["--progress"],
        "hf": ["--to", "huggingface", "--verify", "--resolution", "16"],
        "model.npz": ["--to", "big_vision", "--dtype", "bfloat16", "--verify"],
    }.items():
        outcome = run("convert", store, tmp_path / name, *options)
        assert outcome.code == 0, outcome.err
        assert ("every tensor is as in" in outcome.out) == ("--verify" in options)
        assert ("converting" in outcome.err) == ("--progress" in options)
        assert ("bfloat16" in outcome.out) == ("tokenizer" not in outcome.out) == ("." in name)
        assert run("info", tmp_path / name, "--check").code == 0
    outcome = run("convert", store, tmp_path / "store.npz")
    assert outcome.code == 1 and "--to big_vision" in outcome.err


def test_a_mask_codec_goes_along(
    run: Run, store: Path, pipeline: pg.Pipeline, image: Path, tmp_path: Path
):
    bare, full = tmp_path / "bare", tmp_path / "full"
    dataclasses.replace(pipeline, mask_codec=None).save(bare)
    assert "missing; segment takes it as --mask-codec" in run("info", bare).out
    outcome = run("convert", bare, full, "--mask-codec", image)
    assert outcome.code == 1 and not full.exists()
    outcome = run("convert", bare, tmp_path / "copy")
    assert outcome.code == 0 and "mask codec" not in outcome.out
    outcome = run("convert", bare, full, "--mask-codec", store / "mask_codec.npz")
    assert outcome.code == 0 and "mask codec" in outcome.out
    assert json.loads(run("info", full, "--json").out)["checkpoint"]["mask_codec"] is True
    assert json.loads(run("info", bare, "--json").out)["checkpoint"]["mask_codec"] is False
    assert (full / "mask_codec.npz").read_bytes() == (store / "mask_codec.npz").read_bytes()


@pytest.mark.parametrize("name", ["nothing", "text", "pickled.npz", "truncated"])
def test_bad_checkpoints_are_one_clear_error(run: Run, image: Path, tmp_path: Path, name: str):
    source = tmp_path / name
    if name == "text":
        source.write_text("no checkpoint")
    elif name == "pickled.npz":
        np.savez(source, weights=np.array([{"a": 1}], object))
    elif name == "truncated":
        shutil.copytree(GOLDEN / "huggingface" / "pg1" / "hub_old", source)
        weights = source / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ["convert", source, tmp_path / "target"],
        ["info", source],
        ["caption", image, "--model", source],
    ):
        outcome = run(*command)
        assert outcome.code == 1 and outcome.out == ""
        assert outcome.err.startswith("paligemma: error: ") and name in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_written_leaves_nothing(run: Run, store: Path, tmp_path: Path):
    outcome = run("convert", store, tmp_path / "new", "--tokenizer", GEMMA_TOKENIZER)
    assert outcome.code == 1 and "pieces" in outcome.err
    assert not list(tmp_path.iterdir())
    (tmp_path / "new").mkdir()
    outcome = run("convert", store, tmp_path / "new")
    assert outcome.code == 1 and "exists" in outcome.err
    assert not list((tmp_path / "new").iterdir())


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
    formats = "attention=int8,mlp=int4:8,image=float8"
    for argv in (
        ["quantize", store, tmp_path / "a", "--quantization", formats, "--verify"],
        ["convert", store, tmp_path / "b", "--quantize", formats],
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
def data(tmp_path: Path, image: Path) -> Path:
    """Five records about one image."""
    shutil.copy(image, tmp_path / "noise.png")
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
    argv = ["quantize", "demo", "--report", "--quantization", "int4", "--scenes", "0"]
    argv += ["--prompts", "64"]
    outcome = run(*argv, "--dtype", "float32", "--calibration-prompts", "64", "--json")
    assert outcome.code == 0, outcome.err
    variants = json.loads(outcome.out)["variants"]
    plain, calibrated = (variants[name] for name in ("int4", "int4 calibr."))
    assert calibrated["nbytes"] == plain["nbytes"]
    divergences = [form["agreement"]["divergence"] for form in (calibrated, plain)]
    assert divergences[0] < 0.8 * divergences[1] < 0.015


def _form(agreement: Agreement | None, **scores: float) -> Variant:
    return Variant(2_000_000, 1_000_000, 12.34, agreement, scores)


def test_scores():
    variants = {
        "before": _form(None, counts=0.99, masks=0.80),
        "int8": _form(Agreement(0.00012, 0.999, 10), counts=0.986, masks=0.81),
        "int4": _form(Agreement(0.0123, 0.95, 10), counts=0.96, masks=0.79),
    }
    found = QuantizationReport("bfloat16", 500, variants)
    assert found.losses("int4") == pytest.approx({"counts": 3, "masks": 1})
    assert found.to_dict()["variants"]["int8"]["largest_loss"] == pytest.approx(0.4)
    lines = {line[:26].strip(): line[26:].split() for line in report_lines("demo", found)}
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
        ["quantize", "demo", "--report", "--calibrate", "data.jsonl"],
    ):
        assert run(*argv).code == 2
    outcome = run("quantize", store, store, "--calibrate", "data.jsonl")
    assert outcome.code == 1 and "exists" in outcome.err
    assert run("quantize", "demo", "--report", "--prompts", "0").code == 2
