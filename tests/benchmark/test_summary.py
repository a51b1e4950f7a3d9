"""Rows from records, and how they are shown."""

import dataclasses
import json

import pytest

from paligemma_jax.benchmark.report import BenchmarkResult
from paligemma_jax.benchmark.subjects import Kind
from tests.benchmark.runs import BF16, CEILINGS, DECODE, comparison, record, result


def test_median_spread_and_rates():
    records = [
        record(DECODE, 0.04, 0.06, rows=8, bytes=(2e9,), flops=(1e9,), compilations=3),
        record(DECODE, 0.05, repeat=1, rows=8, bytes=(2e9,), flops=(1e9,), compilations=0),
    ]
    row = result(*records).rows[0]
    assert row.median == 0.05 and row.fastest == 0.04 and row.samples == 3
    assert row.spread == pytest.approx(0.4)
    assert row.per_second == pytest.approx(160)
    assert row.bandwidth == pytest.approx(40e9) and row.rate == pytest.approx(20e9)
    assert row.share is None and row.compilations == 3


def test_disturbed_samples_are_left_out_unless_all_are():
    disturbed = dataclasses.replace(record(DECODE, 0.05, 0.2), others=(0.0, 0.5))
    row = result(disturbed).rows[0]
    assert (row.median, row.samples, row.disturbed) == (0.05, 1, 1)
    always = dataclasses.replace(disturbed, others=(0.5, 0.5))
    row = result(always).rows[0]
    assert (row.median, row.samples, row.disturbed) == (0.125, 2, 2)


def test_the_fastest_peer_in_the_same_precision():
    rows = result(
        record(DECODE, 0.05),
        record(DECODE, 0.10, kind=Kind.HUGGING_FACE),
        record(DECODE, 0.08, kind=Kind.HUGGING_FACE_COMPILED),
        record(DECODE, 0.01, kind=Kind.HUGGING_FACE, dtype=BF16),
    ).rows
    assert rows[0].peer == 0.08 and rows[0].ratio == pytest.approx(1.6)
    assert rows[1].peer is None


def test_less_than_nothing_is_no_time_and_is_said():
    run = result(record(DECODE, -0.01, 0.002))
    assert run.rows[0].median is None
    assert f"{DECODE}, ours float32: too little work to be told from noise" in str(run)


def whole_run() -> BenchmarkResult:
    return result(
        record("load", 1.5, peak_bytes=3_000_000_000),
        record("ceilings", numbers=CEILINGS),
        record(DECODE, 0.05, rows=1, bytes=(2e9,), flops=(1e9,), compilations=2),
        record(DECODE, 0.12, kind=Kind.HUGGING_FACE),
        record("decode, batch 8", kind=Kind.HUGGING_FACE, error="MemoryError: too much"),
        record("memory in decoding, batch 1", numbers={"peak_bytes": 2e9, "ratio": 1.02}),
        comparisons=(comparison(),),
    )


def test_table_for_a_terminal():
    text = str(whole_run())
    assert "mid float32: ours and huggingface answer the same (32 of 32 tokens equal" in text
    assert "read 50 GB/s" in text
    line = next(line for line in text.splitlines() if line.startswith(DECODE))
    for cell in ("ours float32", "50 ms", "80 %", "120 ms", "2.40x"):
        assert cell in line
    assert "decode, batch 8, huggingface float32: MemoryError: too much" in text
    assert "peak 2.000 GB, ratio 1.02" in text
    assert "CPU: decode float32 against Hugging Face" in text and "not run" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_table_of_markdown():
    lines = [x for x in whole_run().to_markdown().splitlines() if x.startswith("|")]
    assert {line.count("|") for line in lines} == {14, 6}
    assert any(line.startswith(f"| {DECODE} | ours float32 | 50 ms |") for line in lines)


def test_outputs_that_differ_are_marked():
    run = result(record(DECODE, 0.05), comparisons=(comparison(same=False),))
    assert "NOT the same: no speed counts" in str(run)
    assert "ours float32 (outputs differ)" in str(run)


def test_json_and_back(tmp_path):
    run = whole_run()
    run.save(tmp_path / "run.json")
    values = json.loads((tmp_path / "run.json").read_text())
    assert {"environment", "rows", "goals", "records", "comparisons"} <= set(values)
    assert BenchmarkResult.from_dict(values) == run
    assert BenchmarkResult.from_dict(values).goals == run.goals
