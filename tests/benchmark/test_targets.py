"""Targets are passed, failed, or not run; never passed without having been run."""

import pytest

from paligemma_jax.benchmark import Task
from paligemma_jax.benchmark.cases import DecodeMemory, MixedLengths, TrainSteps
from paligemma_jax.benchmark.report import BenchmarkResult
from paligemma_jax.benchmark.results import CaseResult
from paligemma_jax.benchmark.targets import Judged, Verdict
from tests.benchmark.runs import (
    BF16,
    DECODE,
    FIRST,
    HUGGING_FACE,
    OURS,
    ROOFLINE,
    case,
    comparison,
    run_of,
)

AGAINST = "CPU: decode float32 against Hugging Face"
PASS, FAIL, STRETCH = Verdict.PASS, Verdict.FAIL, Verdict.STRETCH


def target(run: BenchmarkResult, what: str, model: str | None = None) -> Judged:
    (found,) = (t for t in run.targets if t.what == what and model in (None, t.model))
    return found


def test_nothing_measured_nothing_passed():
    for on_cpu in (True, False):
        targets = run_of(on_cpu=on_cpu).targets
        assert {t.verdict for t in targets} == {Verdict.NOT_RUN}
        assert sum(t.what.startswith("CPU") for t in targets) == 16 and len(targets) == 38
    assert target(run_of(case(DECODE, 0.05)), AGAINST).verdict is Verdict.NOT_RUN  # no baseline


@pytest.mark.parametrize(("ours", "verdict"), [(0.0499, PASS), (0.0501, FAIL), (0.02, PASS)])
def test_speed_against_the_baseline(ours: float, verdict: Verdict):
    results = case(DECODE, ours), case(DECODE, 0.09, implementation=HUGGING_FACE)
    judged = target(run_of(*results, comparisons=(comparison(),)), AGAINST)
    assert judged.value == pytest.approx(0.09 / ours) and judged.verdict is verdict
    differ = run_of(*results, comparisons=(comparison(equal=False),))
    assert target(differ, AGAINST).verdict is Verdict.NOT_EQUAL


@pytest.mark.parametrize(("ours", "verdict"), [(1.0, PASS), (0.9, STRETCH), (1.2, FAIL)])
def test_a_stretch_target(ours: float, verdict: Verdict):
    theirs = case(FIRST, 1.0, dtype=BF16, implementation=HUGGING_FACE)
    what = "CPU: time to first token, bfloat16 against Hugging Face"
    assert target(run_of(case(FIRST, ours, dtype=BF16), theirs), what).verdict is verdict


def test_the_roofline_is_that_of_the_same_repeat():
    results = []
    for repeat, (read, seconds) in enumerate([(50e9, 0.05), (100e9, 0.025), (25e9, 0.1)]):
        results.append(case("roofline", numbers=ROOFLINE | {"read": read}, repeat=repeat))
        results.append(case(DECODE, seconds, repeat=repeat, bytes=(2e9,), flops=(1e6,)))
    judged = target(run_of(*results), "CPU: decode float32, fraction of the roofline")
    assert judged.value == pytest.approx(0.8) and judged.verdict is PASS


@pytest.mark.parametrize(
    ("what", "name", "numbers", "value", "verdict"),
    [
        ("compilations for 50 mixed prompts, over buckets", MixedLengths().name,
         {"buckets": 4.0, "most_compilations": 5.0}, 1.25, FAIL),
        ("compilations for 50 mixed prompts, over buckets", MixedLengths().name,
         {"buckets": 4.0, "most_compilations": 4.0}, 1.0, PASS),
        ("peak memory in decoding over weights and KV cache", DecodeMemory().name,
         {"ratio": 1.09}, 1.09, PASS),
    ],
)  # fmt: skip
def test_at_most(what: str, name: str, numbers: dict[str, float], value: float, verdict: Verdict):
    judged = target(run_of(case(name, numbers=numbers)), f"CPU: {what}")
    assert (judged.value, judged.verdict) == (value, verdict)


def test_starts():
    starts = case("cold start", 4.0, numbers={"compile_seconds": 2.0})
    run = run_of(starts, case("warm start", 2.0, numbers={"compile_seconds": 0.5}))
    assert target(run, "CPU: warm start over cold start").verdict is FAIL
    assert target(run, "CPU: compile time, warm start over cold start").verdict is PASS


def test_our_best_against_bfloat16():
    run = run_of(
        case(DECODE, 0.04),
        case(DECODE, 0.4, dtype=BF16),
        case(DECODE, 0.05, dtype=BF16, implementation=HUGGING_FACE),
    )
    judged = target(run, "CPU: decode, our best against Hugging Face bfloat16")
    assert judged.value == pytest.approx(1.25) and judged.verdict is PASS


def test_targets_of_a_gpu_name_their_models():
    about = {"model": "paligemma2-10b-pt-224", "dtype": BF16}
    run = run_of(
        case(DECODE, 0.002, bytes=(8e9,), flops=(1,), **about),
        case("roofline", numbers=ROOFLINE | {"copy": 5e12}, **about),
        on_cpu=False,
    )
    what = "GPU: decode bfloat16, fraction of the roofline"
    for model, verdict in (
        ("paligemma2-10b-pt-224", PASS),
        ("paligemma2-28b-pt-224", Verdict.NOT_RUN),
        ("paligemma-3b-pt-224", Verdict.NOT_RUN),
    ):
        assert target(run, what, model).verdict is verdict
    assert all(t.verdict is Verdict.NOT_RUN for t in run.targets if t.what.startswith("CPU"))


def trained(seconds: float, peak: float, by: object = OURS, **about: object) -> CaseResult:
    numbers = {"tokens_per_example": 320.0, "datasheet_flops": 1e12}
    whole = {"task": Task.FULL, "unit": "example", "units": 2, "flops": (1e12,), "bytes": (0.0,)}
    whole |= {"implementation": by, "peak_bytes": int(peak), "numbers": numbers} | about
    return case(TrainSteps(lora=False, batch=2).name, seconds, **whole)


def test_training_is_judged_apart():
    results = trained(5.0, 3e9), trained(10.0, 6e9, HUGGING_FACE)
    speed = "CPU: full training, examples/s against Hugging Face"
    memory = "CPU: full training, peak memory over Hugging Face's"
    run = run_of(*results, comparisons=(comparison(equal=False), comparison(task=Task.FULL)))
    assert target(run, speed).verdict is STRETCH and target(run, memory).verdict is PASS
    assert target(run, speed.replace("full", "LoRA")).verdict is Verdict.NOT_RUN
    differ = run_of(*results, comparisons=(comparison(equal=False, task=Task.FULL),))
    assert target(differ, speed).verdict is Verdict.NOT_EQUAL


def test_mfu_is_of_the_datasheet():
    run = run_of(trained(2.0, 3e9, dtype=BF16, model="paligemma-3b-pt-224"), on_cpu=False)
    judged = target(run, "GPU: full training, MFU")
    assert judged.value == pytest.approx(0.5) and judged.verdict is STRETCH
    assert run.measurements[0].numbers["tokens_per_second"] == pytest.approx(320)
