"""Weights of few bits as precisions to measure."""

from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.benchmark.bench import entries
from paligemma_jax.benchmark.cases import Decode, DecodeMemory, Equality, MeasureCeilings
from paligemma_jax.benchmark.huggingface import write_checkpoint
from paligemma_jax.benchmark.report import summarize
from paligemma_jax.benchmark.subjects import TINY, Effort, Kind, Precision, Record
from paligemma_jax.benchmark.worker import Job, run_job
from paligemma_jax.models.quantization_config import QuantizationConfig

INTEGERS = [precision for precision in Precision if precision.quantized]


def test_each_is_a_recipe():
    assert [QuantizationConfig.of(precision.value) for precision in INTEGERS]


@pytest.mark.parametrize(
    ("precision", "written"), [(Precision.INT8, True), *((found, False) for found in INTEGERS)]
)
def test_measured(precision: Precision, written: bool, tmp_path: Path):
    weights = write_checkpoint(tmp_path / "tiny", TINY) if written else None
    cases = (Equality(2, 3), MeasureCeilings(small=True), Decode(1, 12, Effort(2, 2, 0)))
    job = Job("tiny", Kind.OURS, precision, 0, (*cases, DecodeMemory()), weights, tmp_path)
    records: list[Record] = []
    run_job(job, records.append)
    assert not any(record.error for record in records)
    with np.load(job.arrays_file) as arrays:
        assert np.isfinite(arrays["logits"]).all()
    memory = records[-1].numbers
    weights_of_bfloat16 = 2 * (TINY.llm.vocab_size * TINY.llm.width)
    assert memory["weights_bytes"] > weights_of_bfloat16
    (row,) = (r for r in summarize(records, [], on_cpu=True) if r.case == "decode, batch 1")
    assert row.median is None or row.share is not None


def test_a_peer_is_not_asked(tmp_path: Path):
    records: list[Record] = []
    run_job(
        Job("tiny", Kind.HUGGING_FACE, Precision.INT8, 0, (), tmp_path, tmp_path), records.append
    )
    assert "--implementation ours" in (records[0].error or "")


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_only_ours_decodes_with_them(size: str):
    turns = [turn for entry in entries(size) for turn in entry.turns(0)]
    found = [turn for turn in turns if turn.dtype.quantized]
    assert found and {turn.kind for turn in found} == {Kind.OURS}
    for turn in found:
        assert {type(case) for case in turn.cases} <= {MeasureCeilings, Decode}
    floats = entries(size, dtypes=[Precision.FLOAT32])
    assert not [t for entry in floats for t in entry.turns(0) if t.dtype.quantized]
