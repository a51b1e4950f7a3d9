"""Every case on a tiny model, in this process; times are not looked at."""

from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.benchmark.cases import (
    Decode,
    DecodeMemory,
    EncodeImages,
    Equality,
    FirstToken,
    LongAnswer,
    MeasureCeilings,
    MixedLengths,
)
from paligemma_jax.benchmark.huggingface import write_checkpoint
from paligemma_jax.benchmark.report import compare
from paligemma_jax.benchmark.subjects import (
    TINY,
    Busyness,
    Effort,
    Kind,
    Precision,
    Record,
    measure,
    sample,
)
from paligemma_jax.benchmark.worker import Job, run_job

F32 = Precision.FLOAT32
TRIAL = Effort(2, 2, 0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny", TINY)


def records(job: Job) -> dict[str, Record]:
    found: dict[str, Record] = {}
    run_job(job, lambda record: found.update({record.case: record}))
    return found


def test_every_case(weights: Path, tmp_path: Path):
    cases = (
        Equality(2, 3),
        MeasureCeilings(small=True),
        EncodeImages(2, TRIAL),
        FirstToken(2, TRIAL),
        Decode(1, 12, TRIAL),
        LongAnswer(3, 8, TRIAL),
        MixedLengths(),
        DecodeMemory(),
    )
    found = records(Job("tiny", Kind.OURS, F32, 0, cases, weights, tmp_path))
    assert list(found) == ["load", *(case.name for case in cases)]
    assert not any(record.error for record in found.values())
    for case in cases[2:6]:
        assert len(found[case.name].seconds) == 2 and found[case.name].flops
    assert all(n > 0 for n in found["ceilings"].numbers.values())
    mixed = found["50 prompts of mixed lengths"].numbers
    assert mixed["buckets"] == 4 and mixed["most_often"] == mixed["prefill made"] == 4
    memory = found["memory in decoding, batch 1"].numbers
    assert memory["weights_bytes"] > 4 * 200_000
    with np.load(tmp_path / "tiny-ours-float32.npz") as arrays:
        assert arrays["tokens"].shape == (2, 3) and arrays["logits"].shape == (2, 512)


def test_scanned_answers_the_same(weights: Path, tmp_path: Path):
    for kind in (Kind.OURS, Kind.SCANNED):
        job = Job("tiny", kind, F32, 0, (Equality(2, 5),), weights, tmp_path)
        assert not records(job)["equality"].error
    (comparison,) = compare(tmp_path, "tiny")
    assert comparison.equal == 10


def test_weights_made_on_the_device(tmp_path: Path):
    job = Job("tiny", Kind.OURS, Precision.BFLOAT16, 0, (EncodeImages(1, TRIAL),), None, tmp_path)
    assert not any(record.error for record in records(job).values())


def test_what_goes_wrong_is_said_and_the_rest_goes_on(weights: Path, tmp_path: Path):
    job = Job("tiny", Kind.SCANNED, Precision.BFLOAT16, 0, (), weights, tmp_path)
    assert "float32" in (records(job)["load"].error or "")
    cases = (LongAnswer(3, 2, TRIAL), EncodeImages(0, TRIAL), EncodeImages(1, TRIAL))
    found = records(Job("tiny", Kind.SCANNED, F32, 0, cases, None, tmp_path))
    assert "checkpoint" in (found["load"].error or "")
    broken = Decode(0, 12, TRIAL)  # no rows
    found = records(
        Job("tiny", Kind.OURS, F32, 0, (broken, EncodeImages(1, TRIAL)), weights, tmp_path)
    )
    assert "Error" in (found[broken.name].error or "")
    assert not found["image encoding, batch 1"].error


def test_samples_are_taken_in_turn():
    calls: list[str] = []
    steps = [lambda name=name: sample(lambda: calls.append(name)) for name in "ab"]
    taken = measure(steps, Effort(2, 9, 0))
    assert calls == ["a", "b"] * 2
    assert [len(samples) for samples in taken] == [2, 2]
    assert 0.0 <= Busyness().others() <= 1.0
