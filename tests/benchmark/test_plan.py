"""Which processes a benchmark consists of."""

import collections
import math
import time
from pathlib import Path
from typing import Any

import pytest

from paligemma_jax.benchmark import SIZES, TRAINING, Implementation, Precision, Task
from paligemma_jax.benchmark.bench import Runner
from paligemma_jax.benchmark.cases import (
    Decode,
    DecodeMemory,
    MeasureRoofline,
    MixedLengths,
    Outputs,
    TrainSteps,
)
from paligemma_jax.benchmark.plan import Suite, plan
from paligemma_jax.errors import ConfigError
from tests.benchmark.runs import BF16, F32, HUGGING_FACE, OURS

BIG_VISION_STYLE = Implementation.BIG_VISION_STYLE
COMPILED = Implementation.HUGGING_FACE_COMPILED
INFERENCE = [Task.INFERENCE]


def inference(size: str, **narrowed: Any) -> list[Suite]:
    return plan(size, INFERENCE, **narrowed)


@pytest.mark.parametrize("tasks", [INFERENCE, TRAINING])
def test_implementations_alternate_and_come_in_both_orders(tasks: list[Task]):
    (suite,) = plan("cpu", tasks)
    first, second = suite.runs(0), suite.runs(1)
    assert suite.repeats == 3
    about = [(run.implementation, run.dtype, run.task) for run in first]
    assert [(run.implementation, run.dtype, run.task) for run in second] == about[::-1]
    assert {run.implementation for run in first} >= {OURS, HUGGING_FACE}


@pytest.mark.parametrize("size", SIZES)
def test_outputs_come_first_and_ours_has_a_roofline(size: str):
    compared: set[tuple[str, Implementation]] = set()
    for suite in inference(size):
        assert suite.starts == 0 or suite.checkpoint
        for run in suite.runs(0):
            what = run.model, run.implementation
            roofline = [isinstance(case, MeasureRoofline) for case in run.cases]
            assert roofline == [run.implementation is OURS, *[False] * (len(roofline) - 1)]
            cases = run.cases[sum(roofline) :]
            assert not any(isinstance(case, DecodeMemory) for case in cases[1:])
            if suite.checkpoint and what[1] is not BIG_VISION_STYLE and not run.dtype.quantized:
                cases = [case for case in cases if not isinstance(case, DecodeMemory)]
                assert isinstance(cases[0], Outputs) or what in compared
                compared.add(what)


def test_a_gpu_measures_what_its_targets_ask_for():
    cases = collections.defaultdict(set)
    for suite in inference("gpu"):
        for run in suite.runs(0):
            key = run.model, run.implementation, run.dtype
            cases[key] |= {case.name for case in run.cases}
    for model in ("paligemma-3b-pt-224", "paligemma2-3b-pt-224"):
        both = {f"{what}, batch {n}" for what in ("decode", "time to first token") for n in (1, 8)}
        assert both | {"decode, batch 64", "outputs"} <= cases[model, OURS, BF16]
        assert both | {"outputs"} <= cases[model, HUGGING_FACE, BF16]
        assert cases[model, HUGGING_FACE, F32] == {"outputs"}
    one = {"decode, batch 1", "time to first token, batch 1"}
    assert cases["paligemma-3b-pt-224", COMPILED, BF16] == {"outputs", *one}
    for model in ("paligemma-3b-pt-448", "paligemma-3b-pt-896", "paligemma2-10b-pt-224"):
        assert one <= cases[model, OURS, BF16]
    for dtype in (Precision.INT8, Precision.INT4):
        assert "decode, batch 1" in cases["paligemma2-28b-pt-224", OURS, dtype]
        assert "decode, batch 8" in cases["paligemma-3b-pt-224", OURS, dtype]


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_only_ours_decodes_with_integers(size: str):
    runs = [run for suite in inference(size) for run in suite.runs(0) if run.dtype.quantized]
    assert runs and {run.implementation for run in runs} == {OURS}
    for run in runs:
        assert {type(case) for case in run.cases} == {MeasureRoofline, Decode}
    floats = inference(size, dtypes=[F32])
    assert not [run for suite in floats for run in suite.runs(0) if run.dtype.quantized]


def test_what_is_run_once_or_in_one_precision():
    (suite,) = inference("cpu")
    (run,) = (run for run in suite.runs(0) if run.implementation is BIG_VISION_STYLE)
    assert run.dtype is F32 and [type(case) for case in run.cases] == [Decode]
    mixed = [sum(MixedLengths() in run.cases for run in suite.runs(repeat)) for repeat in (0, 1)]
    assert mixed == [1, 0]


def test_narrowed():
    (suite,) = plan(
        "cpu", models=["paligemma2-3b-pt-224"], implementations=[OURS], dtypes=[BF16], repeats=5
    )
    assert suite.model == "paligemma2-3b-pt-224" and suite.repeats == 5
    assert [(run.implementation, run.dtype) for run in suite.runs(0)] == [(OURS, BF16)]
    (suite,) = inference("cpu", dtypes=[BF16])
    reference = suite.runs(0)[-1]
    assert (reference.implementation, reference.dtype) == (HUGGING_FACE, F32)
    assert reference.cases == (Outputs(),)
    (quick,) = inference("cpu", quick=True)
    assert quick.repeats == 1 and BIG_VISION_STYLE not in quick.implementations


def test_narrowed_where_a_model_has_several_suites():
    about = {"models": ["paligemma-3b-pt-224"], "repeats": 3}
    compiled = inference("gpu", implementations=[COMPILED], **about)
    assert [(s.implementations, s.repeats) for s in compiled] == [((COMPILED,), 3)]
    scanned = inference("gpu", implementations=[BIG_VISION_STYLE], dtypes=[F32], **about)
    assert [s.implementations for s in scanned] == [(BIG_VISION_STYLE,)]
    whole = inference("gpu", dtypes=[Precision.INT8], **about)
    assert all(s.dtypes == (Precision.INT8,) and not s.quantized for s in whole)
    (quick,) = inference("gpu", implementations=[COMPILED], quick=True, models=about["models"])
    assert quick.implementations == (COMPILED,)
    other = inference("gpu", models=["paligemma-3b-mix-448"])
    assert len(other) == len(inference("gpu", models=about["models"])) == 4


@pytest.mark.parametrize(
    ("size", "narrowed", "word"),
    [
        ("huge", {}, "huge"),
        ("cpu", {"models": ["paligemma-4b"]}, "paligemma models"),
        ("cpu", {"tasks": TRAINING, "dtypes": [Precision.INT4]}, "int4"),
        ("cpu", {"tasks": TRAINING, "implementations": [BIG_VISION_STYLE]}, "big-vision-style"),
    ],
)
def test_unknown_names(size: str, narrowed: dict[str, Any], word: str):
    with pytest.raises(ConfigError, match=word):
        plan(size, **narrowed)


@pytest.mark.parametrize("size", SIZES)
def test_training_has_both_tasks_and_both_implementations(size: str):
    for suite in plan(size, TRAINING):
        pairs = {(run.implementation, run.task) for run in suite.runs(0)}
        assert pairs == {(by, task) for by in (OURS, HUGGING_FACE) for task in TRAINING}
        assert all(isinstance(run.cases[-1], TrainSteps) for run in suite.runs(0))
    (suite,) = plan(size, [Task.LORA], models=["2-layer-proxy"], quick=True)
    assert (suite.model, suite.repeats, len(suite.runs(0))) == ("2-layer-proxy", 1, 2)


def test_a_gpu_trains_at_the_end_of_the_run_of_everything():
    whole = plan("gpu")
    assert whole[:-1] == inference("gpu") and whole[-1].cases[0].task in TRAINING
    assert plan("cpu") == inference("cpu")
    assert plan("gpu", quick=True) == inference("gpu", quick=True)


def test_every_suite_has_its_part_of_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    left: list[float] = []
    monkeypatch.setattr(
        Runner, "_run_suite", lambda self, suite: left.append(self._end - time.monotonic())
    )
    suites = [Suite("tiny", (), (F32,), (), seconds=seconds) for seconds in (3.0, 1.0)]
    about: dict[str, Any] = {"weights": tmp_path, "on_cpu": True, "progress": print, "found": print}
    Runner(tmp_path, deadline=time.monotonic() + 400, **about).run(suites)
    assert left == [pytest.approx(300, abs=20), pytest.approx(400, abs=20)]  # none was used
    Runner(tmp_path, deadline=math.inf, **about).run(suites)
    assert left[2:] == [math.inf, math.inf]
