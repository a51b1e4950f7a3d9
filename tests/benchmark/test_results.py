"""When outputs count as equal; measurements from results of processes; the report."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.benchmark import Implementation, Precision, Task
from paligemma_jax.benchmark.results import CaseResult, Comparison, compare, outputs_file
from tests.benchmark.runs import (
    BF16,
    DECODE,
    F32,
    HUGGING_FACE,
    OURS,
    ROOFLINE,
    BenchmarkResult,
    case,
    comparison,
    run_of,
)

LOGITS = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
TOKENS = np.arange(16).reshape(2, 8)


def write(folder: Path, by: Implementation, dtype: Precision, error: float, wrong: int = 0) -> None:
    tokens = TOKENS.copy()
    tokens[0, 8 - wrong :] += 1
    path = outputs_file(folder, "model", Task.INFERENCE, dtype, by)
    np.savez(path, logits=LOGITS + error, tokens=tokens)


def compared(folder: Path, dtype: Precision = F32) -> Comparison:
    return next(c for c in compare(folder, "model") if c.dtype is dtype)


@pytest.mark.parametrize(
    ("error", "wrong", "equal"), [(1e-5, 0, True), (1e-5, 3, False), (0.1, 0, False)]
)
def test_float32_must_be_equal(tmp_path: Path, error: float, wrong: int, equal: bool):
    write(tmp_path, OURS, F32, 0.0)
    assert compare(tmp_path, "model") == []
    write(tmp_path, HUGGING_FACE, F32, error, wrong)
    assert compared(tmp_path).equal is equal
    assert f"{16 - wrong} of 16 tokens" in str(compared(tmp_path))


def test_bfloat16_must_be_as_near_as_the_baseline(tmp_path: Path):
    write(tmp_path, HUGGING_FACE, F32, 0.0)
    write(tmp_path, HUGGING_FACE, BF16, 0.02, wrong=3)
    for error, equal in ((0.03, True), (0.05, False)):
        write(tmp_path, OURS, BF16, error)
        assert compared(tmp_path, BF16).equal is equal


def test_bfloat16_without_a_reference_must_have_equal_tokens(tmp_path: Path):
    write(tmp_path, OURS, BF16, 0.0)
    for wrong in (0, 1):
        write(tmp_path, HUGGING_FACE, BF16, 0.02, wrong)
        assert compared(tmp_path, BF16).equal is (wrong == 0)


@pytest.mark.parametrize(
    ("losses", "equal"),
    [
        ((10.0, 9.0, 8.0007), True),
        ((10.0, 9.0, 8.1), False),
        ((10.0,), False),
        ((10.0, 9.0, float("nan")), False),
    ],
)
def test_losses(tmp_path: Path, losses: tuple[float, ...], equal: bool):
    for by, values in ((OURS, (10.0, 9.0, 8.0)), (HUGGING_FACE, losses)):
        path = outputs_file(tmp_path, "model", Task.LORA, F32, by)
        np.savez(path, losses=np.array(values))
    (found,) = compare(tmp_path, "model")
    assert found.task is Task.LORA and found.equal is equal


def test_median_spread_and_rates():
    about = {"unit": "token", "units": 8, "bytes": (2e9,), "flops": (1e9,)}
    first = case(DECODE, 0.04, 0.06, compilations=3, **about)
    (m,) = run_of(first, case(DECODE, 0.05, repeat=1, compilations=0, **about)).measurements
    assert (m.median, m.fastest, m.samples, m.compilations) == (0.05, 0.04, 3, 3)
    assert m.spread == pytest.approx(0.4) and m.throughput == pytest.approx(160)
    assert m.bandwidth == pytest.approx(40e9) and m.flops == pytest.approx(20e9)
    assert m.roofline_fraction is None


def test_noisy_samples_are_filtered_out_unless_all_are():
    noisy = dataclasses.replace(case(DECODE, 0.05, 0.2), other_cpu=(0.0, 0.5))
    for other_cpu, expected in (((0.0, 0.5), (0.05, 1, 1)), ((0.5, 0.5), (0.125, 2, 2))):
        (m,) = run_of(dataclasses.replace(noisy, other_cpu=other_cpu)).measurements
        assert (m.median, m.samples, m.noisy) == expected


def test_the_fastest_baseline_in_the_same_precision():
    measured = run_of(
        case(DECODE, 0.05),
        case(DECODE, 0.10, implementation=HUGGING_FACE),
        case(DECODE, 0.08, implementation=Implementation.HUGGING_FACE_COMPILED),
        case(DECODE, 0.01, implementation=HUGGING_FACE, dtype=BF16),
    ).measurements
    assert measured[0].baseline == 0.08 and measured[0].speedup == pytest.approx(1.6)
    assert measured[1].baseline is None


def test_less_than_nothing_is_no_time():
    run = run_of(case(DECODE, -0.01, 0.002))
    assert run.measurements[0].median is None and "too little work" in str(run)


def whole_run() -> BenchmarkResult:
    return run_of(
        case("load", 1.5, peak_bytes=3_000_000_000),
        case("roofline", numbers=ROOFLINE),
        case(DECODE, 0.05, unit="token", units=1, bytes=(2e9,), flops=(1e9,), compilations=2),
        case(DECODE, 0.12, unit="token", units=1, implementation=HUGGING_FACE),
        case("decode, batch 8", implementation=HUGGING_FACE, error="MemoryError: too much"),
        case("decode memory, batch 1", numbers={"peak_bytes": 2e9, "ratio": 1.02}),
        comparisons=(comparison(),),
    )


def test_the_report():
    text = str(whole_run())
    assert "paligemma-jax and huggingface are equal (32 of 32 tokens equal" in text
    assert "read 50 GB/s" in text and "peak 2.000 GB, ratio 1.02" in text
    line = next(line for line in text.splitlines() if line.startswith(DECODE))
    for cell in ("paligemma-jax float32", "50 ms/token", "20 tokens/s", "80 %", "120 ms", "2.40x"):
        assert cell in line
    assert "decode, batch 8, huggingface float32: MemoryError: too much" in text
    assert "CPU: decode float32 against Hugging Face" in text and "not run" in text
    lines = [x for x in whole_run().to_markdown().splitlines() if x.startswith("|")]
    assert {line.count("|") for line in lines} == {14, 6}
    assert any(f"| {DECODE} | paligemma-jax float32 | 50 ms/token |" in line for line in lines)


def test_outputs_that_differ_are_marked():
    text = str(run_of(case(DECODE, 0.05), comparisons=(comparison(equal=False),)))
    assert "DIFFER: no speed counts" in text and "paligemma-jax float32 (outputs differ)" in text


def test_json(tmp_path: Path):
    run = whole_run()
    run.save(tmp_path / "run.json")
    values = json.loads((tmp_path / "run.json").read_text())
    assert set(values) >= {"environment", "measurements", "targets", "results", "comparisons"}
    assert [CaseResult.from_dict(result) for result in values["results"]] == list(run.results)
