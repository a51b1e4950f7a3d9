"""Training in the benchmark: its plan, its goals, and a tiny model trained by both."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.benchmark.bench import TrainEntry, _chosen, entries, train_entries
from paligemma_jax.benchmark.huggingface import adapter_directory, write_checkpoint
from paligemma_jax.benchmark.report import BenchmarkResult, Verdict, compare_losses, judge
from paligemma_jax.benchmark.subjects import (
    TINY,
    TRAINING,
    Effort,
    Kind,
    Precision,
    Record,
    Task,
    TrainSteps,
    find_model,
    loss_numbers,
    losses_of,
)
from paligemma_jax.benchmark.train_worker import TrainJob, run_train_job
from paligemma_jax.errors import ConfigError
from tests.benchmark.runs import comparison, record, result

F32, BF16 = Precision.FLOAT32, Precision.BFLOAT16
TRIAL = Effort(2, 2, 0)
SAME = "the same"


def trained(
    kind: Kind, seconds: float, peak: float, *losses: float, task: Task = Task.FULL, **more: float
) -> Record:
    """Steps of "mid" that never were."""
    made = record(
        TrainSteps(task, 2).name,
        seconds,
        kind=kind,
        task=task,
        rows=2,
        flops=(1e12,),
        bytes=(0.0,),
        peak_bytes=int(peak),
        numbers=loss_numbers(list(losses)) | {"tokens_a_sample": 320.0, **more},
    )
    return made


def run_of(*records: Record, on_cpu: bool = True) -> BenchmarkResult:
    """With its comparisons."""
    return dataclasses.replace(
        result(*records, on_cpu=on_cpu),
        comparisons=tuple(compare_losses(records, records[0].model)),
    )


def verdicts(run: BenchmarkResult, word: str) -> list[Verdict]:
    return [goal.verdict for goal in run.goals if goal.what.startswith(word)]


def test_every_size_has_both_tasks_and_both_implementations():
    for size in ("tiny", "cpu", "gpu"):
        for entry in train_entries(size, TRAINING):
            first, second = entry.turns(0), entry.turns(1)
            assert first == [dataclasses.replace(t, repeat=0) for t in second][::-1]
            assert {(t.kind, t.case.task) for t in first} == {
                (kind, task) for kind in (Kind.OURS, Kind.HUGGING_FACE) for task in TRAINING
            }
    (entry,) = train_entries("cpu", [Task.LORA], models=["small"], quick=True)
    assert (entry.model, entry.repeats, len(entry.turns(0))) == ("small", 1, 2)


def test_what_nothing_is_trained_with():
    with pytest.raises(ConfigError, match="int4"):
        train_entries("cpu", TRAINING, dtypes=[Precision.INT4])
    with pytest.raises(ConfigError, match="scanned"):
        train_entries("cpu", TRAINING, kinds=[Kind.SCANNED])
    with pytest.raises(ConfigError, match="huge"):
        train_entries("huge", TRAINING)


def test_a_gpu_trains_at_the_end_of_the_run_of_everything():
    whole = _chosen("gpu", None)
    training = [entry for entry in whole if isinstance(entry, TrainEntry)]
    assert training == whole[-1:]
    assert len(whole) == len(entries("gpu")) + 1
    assert not any(isinstance(entry, TrainEntry) for entry in _chosen("cpu", None))
    assert all(isinstance(entry, TrainEntry) for entry in _chosen("gpu", [Task.FULL]))


def test_operations_are_three_passes_of_what_is_trained():
    config = find_model("paligemma-3b-pt-224")
    full, lora = (TrainSteps(task, 1).operations(config) for task in TRAINING)
    assert 4.4e12 < full < 5.0e12  # perf: 4.61 T with the logits of 32 tokens, here of 64
    assert 2.7e12 < lora < 3.1e12
    assert TrainSteps(Task.FULL, 8).operations(config) == 8 * full


def test_jobs_survive_json(tmp_path: Path):
    (entry,) = train_entries("cpu", TRAINING)
    for turn in entry.turns(0):
        job = turn.job(tmp_path, tmp_path)
        assert TrainJob.from_dict(json.loads(json.dumps(job.to_dict()))) == job


def test_losses_decide_whether_speed_counts():
    losses = (10.0, 9.0, 8.0)
    ours = trained(Kind.OURS, 5.0, 3e9, *losses)
    assert losses_of(ours.numbers) == list(losses)
    same = run_of(ours, trained(Kind.HUGGING_FACE, 10.0, 6e9, 10.0, 9.0, 8.0007))
    assert same.comparisons[0].same and "train the same" in str(same)
    assert verdicts(same, "CPU: full") == [Verdict.STRETCH, Verdict.PASS]
    assert verdicts(same, "CPU: LoRA") == [Verdict.NOT_RUN] * 2
    other = run_of(ours, trained(Kind.HUGGING_FACE, 10.0, 6e9, 10.0, 9.0, 8.1))
    assert not other.comparisons[0].same
    assert verdicts(other, "CPU: full") == [Verdict.NOT_EQUAL] * 2
    short = run_of(ours, trained(Kind.HUGGING_FACE, 10.0, 6e9, 10.0))
    assert not short.comparisons[0].same
    nan = run_of(ours, trained(Kind.HUGGING_FACE, 10.0, 6e9, 10.0, 9.0, float("nan")))
    assert not nan.comparisons[0].same
    assert BenchmarkResult.from_dict(json.loads(json.dumps(same.to_dict()))) == same


def test_answers_and_training_are_judged_apart():
    ours = trained(Kind.OURS, 5.0, 3e9, 10.0)
    theirs = trained(Kind.HUGGING_FACE, 10.0, 6e9, 10.0)
    found = run_of(ours, theirs)
    both = dataclasses.replace(found, comparisons=(*found.comparisons, comparison(same=False)))
    assert verdicts(both, "CPU: full") == [Verdict.STRETCH, Verdict.PASS]


def test_utilisation_is_of_the_datasheet():
    ours = trained(Kind.OURS, 2.0, 3e9, 10.0, datasheet_rate=1e12)
    ours = dataclasses.replace(ours, dtype=BF16, model="paligemma-3b-pt-224")
    run = run_of(ours, on_cpu=False)
    (goal,) = (g for g in judge(run.rows, on_cpu=False) if g.what == "GPU: full training, MFU")
    assert goal.value == pytest.approx(0.5) and goal.verdict is Verdict.STRETCH
    assert run.rows[0].numbers["tokens_a_second"] == pytest.approx(320)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny", TINY)


def test_adapters_are_written_once_and_equal(weights: Path, tmp_path: Path):
    folder = adapter_directory(weights, TINY)
    again = adapter_directory(tmp_path / "other", TINY)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert adapter_directory(weights, TINY) == folder


@pytest.mark.parity
@pytest.mark.parametrize("task", TRAINING)
def test_both_train_the_same(weights: Path, task: Task):
    pytest.importorskip("peft", reason="the extra parity is not installed")
    records: list[Record] = []
    case = TrainSteps(task, 2, text=12, suffix=4, effort=TRIAL)
    for kind in (Kind.OURS, Kind.HUGGING_FACE):
        run_train_job(TrainJob("tiny", kind, F32, 0, case, weights, small=True), records.append)
    assert [r.error for r in records] == [None] * 5
    (found,) = compare_losses(records, "tiny")
    assert found.same and len(found.ours) == 3
    assert np.all(np.diff(found.ours) < -1e-4)  # they move, or their equality would say little
    ours = next(r for r in records if r.case == case.name and r.kind is Kind.OURS)
    assert ours.compilations == 1 and ours.numbers["temporary_bytes"] > 0
