"""Which processes a run consists of."""

import collections
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from paligemma_jax.benchmark.bench import SIZES, entries, run
from paligemma_jax.benchmark.cases import (
    Decode,
    DecodeMemory,
    Equality,
    MeasureCeilings,
    MixedLengths,
)
from paligemma_jax.benchmark.subjects import Kind, Precision, Task
from paligemma_jax.benchmark.worker import Job
from paligemma_jax.cli import evaluate as command
from paligemma_jax.errors import ConfigError

BF16 = Precision.BFLOAT16


def test_implementations_alternate_and_come_in_both_orders():
    (entry,) = entries("cpu")
    first, second = entry.turns(0), entry.turns(1)
    assert entry.repeats == 3
    assert [(t.kind, t.dtype) for t in second] == [(t.kind, t.dtype) for t in first][::-1]
    assert {t.kind for t in first} == {Kind.OURS, Kind.SCANNED, Kind.HUGGING_FACE}


def test_every_implementation_is_compared_first_and_has_ceilings():
    for size in SIZES:
        compared: set[tuple[str, Kind]] = set()
        for entry in entries(size):
            for turn in entry.turns(0):
                what = turn.model, turn.kind
                if entry.written and turn.kind is not Kind.SCANNED and not turn.dtype.quantized:
                    answered = [c for c in turn.cases if not isinstance(c, DecodeMemory)]
                    assert isinstance(answered[0], Equality) or what in compared
                    compared.add(what)
                assert not any(isinstance(c, DecodeMemory) for c in turn.cases[1:])
                measures = any(isinstance(case, MeasureCeilings) for case in turn.cases)
                assert measures == (turn.kind is Kind.OURS)


def test_a_gpu_measures_what_its_goals_ask_for():
    cases = collections.defaultdict(set)
    for entry in entries("gpu"):
        assert entry.starts == 0 or entry.written
        for turn in entry.turns(0):
            cases[turn.model, turn.kind, turn.dtype] |= {case.name for case in turn.cases}
    ours, peer = Kind.OURS, Kind.HUGGING_FACE
    for model in ("paligemma-3b-pt-224", "paligemma2-3b-pt-224"):
        both = {f"{what}, batch {n}" for what in ("decode", "first token") for n in (1, 8)}
        assert both | {"decode, batch 64", "equality"} <= cases[model, ours, BF16]
        assert both | {"equality"} <= cases[model, peer, BF16]
        assert cases[model, peer, Precision.FLOAT32] == {"equality"}
    first = cases["paligemma-3b-pt-224", Kind.HUGGING_FACE_COMPILED, BF16]
    assert first == {"equality", "decode, batch 1", "first token, batch 1"}
    for model in ("paligemma-3b-pt-448", "paligemma-3b-pt-896", "paligemma2-10b-pt-224"):
        assert {"first token, batch 1", "decode, batch 1"} <= cases[model, ours, BF16]
    for dtype in (Precision.INT8, Precision.INT4):
        assert "decode, batch 1" in cases["paligemma2-28b-pt-224", ours, dtype]
        assert "decode, batch 8" in cases["paligemma-3b-pt-224", ours, dtype]


def test_big_vision_is_asked_to_decode_in_float32_only():
    turns = [turn for turn in entries("cpu")[0].turns(0) if turn.kind is Kind.SCANNED]
    assert len(turns) == 1 and turns[0].dtype is Precision.FLOAT32
    assert [type(case) for case in turns[0].cases] == [Decode]


def test_cases_of_the_first_repeat_only():
    (entry,) = entries("cpu")
    found = [any(isinstance(c, MixedLengths) for c in t.cases) for t in entry.turns(0)]
    assert sum(found) == 1
    assert not any(isinstance(c, MixedLengths) for t in entry.turns(1) for c in t.cases)


def test_a_gpu_decodes_all_sizes():
    models = {entry.model for entry in entries("gpu")}
    assert {"paligemma-3b-pt-224", "paligemma2-3b-pt-224"} <= models
    assert {"paligemma2-10b-pt-224", "paligemma2-28b-pt-224"} <= models


def test_narrowed():
    (entry,) = entries(
        "cpu",
        models=["paligemma2-3b-pt-224"],
        kinds=[Kind.OURS],
        dtypes=[Precision.BFLOAT16],
        repeats=5,
    )
    assert entry.model == "paligemma2-3b-pt-224" and entry.repeats == 5
    assert [(t.kind, t.dtype) for t in entry.turns(0)] == [(Kind.OURS, Precision.BFLOAT16)]
    (entry,) = entries("cpu", dtypes=[Precision.BFLOAT16])
    reference = entry.turns(0)[-1]
    assert (reference.kind, reference.dtype) == (Kind.HUGGING_FACE, Precision.FLOAT32)
    assert reference.cases == (Equality(),)
    (quick,) = entries("cpu", quick=True)
    assert quick.repeats == 1 and Kind.SCANNED not in quick.kinds


def test_narrowed_where_a_model_has_several_entries():
    about = {"models": ["paligemma-3b-pt-224"], "repeats": 3}
    compiled = entries("gpu", kinds=[Kind.HUGGING_FACE_COMPILED], **about)
    assert [(e.kinds, e.repeats) for e in compiled] == [((Kind.HUGGING_FACE_COMPILED,), 3)]
    scanned = entries("gpu", kinds=[Kind.SCANNED], dtypes=[Precision.FLOAT32], **about)
    assert [e.kinds for e in scanned] == [(Kind.SCANNED,)]
    whole = entries("gpu", dtypes=[Precision.INT8], **about)
    assert all(e.dtypes == (Precision.INT8,) and not e.quantized for e in whole)
    (quick,) = entries(
        "gpu", kinds=[Kind.HUGGING_FACE_COMPILED], quick=True, models=about["models"]
    )
    assert quick.kinds == (Kind.HUGGING_FACE_COMPILED,)
    other = entries("gpu", models=["paligemma-3b-mix-448"])
    assert len(other) == len(entries("gpu", models=["paligemma-3b-pt-224"])) == 4


@pytest.mark.parametrize(("size", "models"), [("huge", None), ("cpu", ["paligemma-4b"])])
def test_unknown_names(size: str, models: list[str] | None):
    with pytest.raises(ConfigError):
        entries(size, models=models)


def test_every_model_has_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    left: list[float] = []

    def entry(runner: Any, entry: Any) -> None:
        left.append(runner._seconds_left())

    monkeypatch.setattr(f"{run.__module__}._Runner._entry", entry)
    one, two = (dataclasses.replace(SIZES["tiny"][0], share=share) for share in (3.0, 1.0))
    about = {"folder": tmp_path, "on_cpu": True, "progress": print, "found": print}
    run([one, two], deadline=time.monotonic() + 400, **about)
    assert left == [pytest.approx(300, abs=20), pytest.approx(400, abs=20)]  # none was used
    run([one, two], deadline=math.inf, **about)
    assert left[2:] == [math.inf, math.inf]


def test_jobs_survive_json(tmp_path: Path):
    for turn in entries("cpu")[0].turns(0):
        job = Job(**vars(turn), weights=tmp_path, arrays=tmp_path)
        assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job


def test_the_command_knows_the_same_names():
    assert set(command.SIZES) == set(SIZES)
    assert set(command.IMPLEMENTATIONS) == set(Kind)
    assert set(command.DTYPES) == set(Precision)
    assert set(command.TASKS) == set(Task)
