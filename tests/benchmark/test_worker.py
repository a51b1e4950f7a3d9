"""Every case on a tiny model, in this process; times are not looked at."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_jax.benchmark import TRAINING, Implementation, Precision, Task
from paligemma_jax.benchmark.cases import (
    Case,
    Decode,
    DecodeMemory,
    EncodeImages,
    FirstToken,
    LongDecode,
    MeasureRoofline,
    MixedLengths,
    Outputs,
    Start,
    TrainSteps,
)
from paligemma_jax.benchmark.measure import Effort, Stopwatch, measure, timed
from paligemma_jax.benchmark.plan import Job, Run
from paligemma_jax.benchmark.random_checkpoint import write_checkpoint
from paligemma_jax.benchmark.results import CaseResult, compare, outputs_file, summarize
from paligemma_jax.benchmark.subjects import TINY, find_model
from paligemma_jax.benchmark.trainers import adapter_directory
from paligemma_jax.benchmark.worker import run_job
from paligemma_jax.models.quantization_config import QuantizationConfig
from tests.benchmark.runs import F32, HUGGING_FACE, OURS

TRIAL = Effort(2, 2, 0)
INTEGERS = [precision for precision in Precision if precision.quantized]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny", TINY)


def measured(
    folder: Path,
    weights: Path | None,
    *cases: Case,
    by: Implementation = OURS,
    dtype: Precision = F32,
) -> dict[str, CaseResult]:
    run = Run("tiny", by, dtype, 0, cases)
    found: dict[str, CaseResult] = {}
    job = Job(run, weights, outputs_file(folder, run.model, run.task, dtype, by))
    run_job(job, lambda result: found.update({result.case: result}))
    return found


def test_every_case(weights: Path, tmp_path: Path):
    timed_cases = (
        EncodeImages(2, TRIAL),
        FirstToken(2, TRIAL),
        Decode(1, 12, TRIAL),
        LongDecode(1, 3, 8, TRIAL),
    )
    cases = (MeasureRoofline(small=True), Outputs(2, 3), *timed_cases, MixedLengths())
    found = measured(tmp_path, weights, *cases, DecodeMemory())
    assert [*found][:2] == ["roofline", "load"]
    assert [*found][2:] == [case.name for case in (*cases[1:], DecodeMemory())]
    assert not any(result.error for result in found.values())
    for case in timed_cases:
        assert len(found[case.name].seconds) == 2 and found[case.name].flops
    assert all(n > 0 for n in found["roofline"].numbers.values())
    mixed = found[MixedLengths().name].numbers
    assert mixed["buckets"] == mixed["most_compilations"] == mixed["prefill_compilations"] == 4
    assert found[DecodeMemory().name].numbers["weights_bytes"] > 4 * 200_000
    with np.load(outputs_file(tmp_path, "tiny", Task.INFERENCE, F32, OURS)) as arrays:
        assert arrays["tokens"].shape == (2, 3) and arrays["logits"].shape == (2, 512)


@pytest.mark.parametrize(
    ("precision", "written"), [(Precision.INT8, True), *((found, False) for found in INTEGERS)]
)
def test_integers(precision: Precision, written: bool, weights: Path, tmp_path: Path):
    assert QuantizationConfig.of(precision.value)
    cases = (MeasureRoofline(small=True), Outputs(2, 3), Decode(1, 12, TRIAL), DecodeMemory())
    found = measured(tmp_path, weights if written else None, *cases, dtype=precision)
    assert not any(result.error for result in found.values())
    with np.load(outputs_file(tmp_path, "tiny", Task.INFERENCE, precision, OURS)) as arrays:
        assert np.isfinite(arrays["logits"]).all()
    embedding = 2 * TINY.llm.vocab_size * TINY.llm.width
    assert found[DecodeMemory().name].numbers["weights_bytes"] > embedding
    (decode,) = (
        m for m in summarize([*found.values()], [], on_cpu=True) if m.case == "decode, batch 1"
    )
    assert decode.median is None or decode.roofline_fraction is not None


def test_big_vision_style_gives_the_same(weights: Path, tmp_path: Path):
    for by in (OURS, Implementation.BIG_VISION_STYLE):
        assert not measured(tmp_path, weights, Outputs(2, 5), by=by)["outputs"].error
    (comparison,) = compare(tmp_path, "tiny")
    assert "10 of 10 tokens" in comparison.details


def test_a_start_is_measured_from_the_spawning_of_its_process(weights: Path, tmp_path: Path):
    found = measured(tmp_path, weights, Start(warm=False))
    assert [*found] == ["cold start"]
    numbers = found["cold start"].numbers
    parts = sum(numbers[f"{part}_seconds"] for part in ("import", "load", "first_token"))
    assert found["cold start"].seconds == (pytest.approx(parts),)


@pytest.mark.parametrize(
    ("about", "checkpoint", "word"),
    [
        ({"by": Implementation.BIG_VISION_STYLE, "dtype": Precision.BFLOAT16}, True, "float32"),
        ({"by": Implementation.BIG_VISION_STYLE}, False, "checkpoint"),
        ({"by": HUGGING_FACE, "dtype": Precision.INT8}, True, "--implementation paligemma-jax"),
    ],
)
def test_what_cannot_be_loaded(
    weights: Path, tmp_path: Path, about: dict[str, Any], checkpoint: bool, word: str
):
    found = measured(tmp_path, weights if checkpoint else None, Outputs(), **about)
    assert [*found] == ["load"] and word in (found["load"].error or "")


def test_what_fails_is_reported_and_the_rest_goes_on(weights: Path, tmp_path: Path):
    empty = Decode(0, 12, TRIAL)
    found = measured(tmp_path, weights, empty, EncodeImages(1, TRIAL))
    assert "Error" in (found[empty.name].error or "")
    assert not found["image encoding, batch 1"].error


def test_samples_are_taken_in_turn():
    calls: list[str] = []
    steps = [lambda name=name: timed(lambda: calls.append(name)) for name in "ab"]
    taken = measure(steps, Effort(2, 9, 0))
    assert calls == ["a", "b"] * 2
    assert [len(samples) for samples in taken] == [2, 2]
    assert 0.0 <= Stopwatch().stop().other_cpu <= 1.0


def test_training_counts_three_passes_of_what_is_trained():
    config = find_model("paligemma-3b-pt-224")
    full, lora, eight = (
        TrainSteps(lora, batch).work(config, F32)[0].flops
        for lora, batch in ((False, 1), (True, 1), (False, 8))
    )
    assert 4.4e12 < full < 5.0e12 and 2.7e12 < lora < 3.1e12
    assert eight == 8 * full


def test_adapters_are_written_once_and_equal(weights: Path, tmp_path: Path):
    folder = adapter_directory(weights, TINY)
    again = adapter_directory(tmp_path / "other", TINY)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert adapter_directory(weights, TINY) == folder


@pytest.mark.parity
@pytest.mark.parametrize("task", TRAINING)
def test_both_train_the_same(weights: Path, tmp_path: Path, task: Task):
    pytest.importorskip("peft", reason="the extra parity is not installed")
    case = TrainSteps(task is Task.LORA, 2, text=12, suffix=4, effort=TRIAL)
    found = {by: measured(tmp_path, weights, case, by=by) for by in (OURS, HUGGING_FACE)}
    for results in found.values():
        assert [*results] == [f"load for {case.name}", case.name]
        assert not any(result.error for result in results.values())
    (comparison,) = compare(tmp_path, "tiny")
    assert comparison.equal and comparison.task is task
    with np.load(outputs_file(tmp_path, "tiny", task, F32, OURS)) as arrays:
        # They move, or their equality would say little.
        assert len(arrays["losses"]) == 3 and np.all(np.diff(arrays["losses"]) < -1e-4)
    ours = found[OURS][case.name]
    assert ours.compilations == 1 and ours.numbers["temporary_bytes"] > 0
