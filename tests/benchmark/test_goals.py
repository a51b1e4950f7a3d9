"""Goals are passed, failed, or not run; never passed without having been run."""

import pytest

from paligemma_jax.benchmark.report import BenchmarkResult, Judged, Verdict
from paligemma_jax.benchmark.subjects import Kind
from tests.benchmark.runs import BF16, CEILINGS, DECODE, FIRST, comparison, record, result

AGAINST = "CPU: decode float32 against Hugging Face"


def goal(run: BenchmarkResult, what: str, model: str | None = None) -> Judged:
    found = [g for g in run.goals if g.what == what and model in (None, g.model)]
    assert len(found) == 1
    return found[0]


def test_nothing_measured_nothing_passed():
    for on_cpu in (True, False):
        goals = result(on_cpu=on_cpu).goals
        assert {g.verdict for g in goals} == {Verdict.NOT_RUN}
        assert sum(g.what.startswith("CPU") for g in goals) == 16


@pytest.mark.parametrize(
    ("ours", "verdict"), [(0.0499, Verdict.PASS), (0.0501, Verdict.FAIL), (0.02, Verdict.PASS)]
)
def test_speed_beside_the_peer(ours: float, verdict: Verdict):
    peer = record(DECODE, 0.09, kind=Kind.HUGGING_FACE)
    run = result(record(DECODE, ours), peer, comparisons=(comparison(),))
    judged = goal(run, AGAINST)
    assert judged.value == pytest.approx(0.09 / ours) and judged.verdict is verdict


def test_without_a_peer_it_is_not_run():
    run = result(record(DECODE, 0.05), record("ceilings", numbers=CEILINGS))
    assert goal(run, AGAINST).verdict is Verdict.NOT_RUN


def test_other_outputs_never_count():
    peer = record(DECODE, 0.9, kind=Kind.HUGGING_FACE)
    run = result(record(DECODE, 0.05), peer, comparisons=(comparison(same=False),))
    assert goal(run, AGAINST).verdict is Verdict.NOT_EQUAL


def test_a_stretch_goal():
    what = "CPU: image + prefill bfloat16 against Hugging Face"
    for ours, verdict in ((1.0, Verdict.PASS), (0.9, Verdict.STRETCH), (1.2, Verdict.FAIL)):
        run = result(
            record(FIRST, ours, dtype=BF16),
            record(FIRST, 1.0, dtype=BF16, kind=Kind.HUGGING_FACE),
        )
        assert goal(run, what).verdict is verdict


def test_share_of_the_floor_uses_the_ceilings_of_the_same_repeat():
    what = "CPU: decode float32, share of the memory floor"
    records = []
    for repeat, (read, seconds) in enumerate([(50e9, 0.05), (100e9, 0.025), (25e9, 0.1)]):
        numbers = CEILINGS | {"read": read}
        records.append(record("ceilings", numbers=numbers, repeat=repeat))
        records.append(record(DECODE, seconds, repeat=repeat, bytes=(2e9,), flops=(1e6,)))
    judged = goal(result(*records), what)
    assert judged.value == pytest.approx(0.8) and judged.verdict is Verdict.PASS


def test_at_most():
    what = "CPU: programs for 50 mixed prompts, by the number of buckets"
    for most, verdict in ((4, Verdict.PASS), (5, Verdict.FAIL)):
        numbers = {"buckets": 4.0, "most_often": float(most)}
        run = result(record("50 prompts of mixed lengths", numbers=numbers))
        assert goal(run, what).verdict is verdict


def test_best_of_ours_against_bfloat16():
    run = result(
        record(DECODE, 0.04),
        record(DECODE, 0.4, dtype=BF16),
        record(DECODE, 0.05, dtype=BF16, kind=Kind.HUGGING_FACE),
    )
    judged = goal(run, "CPU: decode, our best against Hugging Face bfloat16")
    assert judged.value == pytest.approx(1.25) and judged.verdict is Verdict.PASS


def test_goals_of_a_gpu_name_their_models():
    run = result(
        record(DECODE, 0.002, model="paligemma2-10b-pt-224", dtype=BF16, bytes=(8e9,), flops=(1,)),
        record("ceilings", numbers=CEILINGS | {"copy": 5e12}, model="paligemma2-10b-pt-224"),
        on_cpu=False,
    )
    what = "GPU: decode bfloat16, share of the memory floor"
    assert goal(run, what, "paligemma2-10b-pt-224").verdict is Verdict.PASS
    assert goal(run, what, "paligemma2-28b-pt-224").verdict is Verdict.NOT_RUN
    assert goal(run, what, "paligemma-3b-pt-224").verdict is Verdict.NOT_RUN
    assert all(g.verdict is Verdict.NOT_RUN for g in run.goals if g.what.startswith("CPU"))
