"""One measuring process: `python -m paligemma_jax.benchmark.worker JOB`, JOB being a pickled `Job`.

A line of JSON, a `CaseResult`, goes to standard output for each case as soon as it is done;
whatever else is printed goes to standard error.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax.benchmark import BASELINES, Implementation
from paligemma_jax.benchmark.cases import Case, Context, MeasureRoofline, Start, TrainSteps
from paligemma_jax.benchmark.measure import peak_resident
from paligemma_jax.benchmark.plan import Job
from paligemma_jax.benchmark.results import CaseResult
from paligemma_jax.benchmark.subjects import find_model, open_subject
from paligemma_jax.errors import PaliGemmaError

Report = Callable[[CaseResult], None]


def run_job(job: Job, report: Report) -> None:
    """Loads the subject and measures case after case; what fails is reported as an error."""
    run = job.run
    if isinstance(run.cases[0], Start):
        report(_measure_start(job, run.cases[0]))
        return
    # Before a subject is there: peak memory of devices cannot be reset.
    for case in run.cases:
        if isinstance(case, MeasureRoofline):
            outcome = case.run(Context(None, find_model(run.model)))
            report(CaseResult.of(run, case.name, numbers=dict(outcome.numbers)))
    held = _held_bytes(run.implementation)
    start = time.perf_counter()
    try:
        subject = _open(job)
    except PaliGemmaError as e:
        report(CaseResult.of(run, run.load, error=str(e)))
        return
    seconds = time.perf_counter() - start
    loaded = {"seconds": (seconds,), "other_cpu": (0.0,), "peak_bytes": peak_resident()}
    report(CaseResult.of(run, run.load, **loaded))
    compiles = run.implementation is not Implementation.HUGGING_FACE
    context = Context(subject, find_model(run.model), compiles, held)
    for case in run.cases:
        if isinstance(case, MeasureRoofline):
            continue
        try:
            report(_measure(job, case, context))
        except Exception as e:  # the other cases may work, such as memory for a smaller batch
            first = (str(e).splitlines() or [""])[0]
            report(CaseResult.of(run, case.name, error=f"{type(e).__name__}: {first[:300]}"))


def _open(job: Job) -> Any:
    run, case = job.run, job.run.cases[-1]
    if not isinstance(case, TrainSteps):
        return open_subject(run.implementation, job.weights, run.model, run.dtype)
    from paligemma_jax.benchmark import trainers

    assert job.weights is not None, "training starts from a checkpoint"
    if run.implementation is Implementation.OURS:
        return trainers.load_our_trainer(job.weights, run.dtype, case)
    return trainers.load_huggingface_trainer(job.weights, find_model(run.model), run.dtype, case)


def _measure(job: Job, case: Case, context: Context) -> CaseResult:
    compiled: dict[str, Any] = {}
    if job.run.implementation in BASELINES:
        outcome = case.run(context)
    else:
        from paligemma_jax.benchmark.ours import Compilations

        with Compilations() as counted:
            outcome = case.run(context)
        compiled = {"compilations": sum(counted.own.values()), "compile_seconds": counted.seconds}
    compiled["peak_bytes"] = context.subject.peak_bytes()
    numbers = dict(outcome.numbers)
    if isinstance(case, TrainSteps):
        numbers |= context.subject.numbers()
    if outcome.outputs:
        np.savez(job.outputs, allow_pickle=False, **outcome.outputs)
    work = case.work(context.config, job.run.dtype)
    return CaseResult.of(
        job.run,
        case.name,
        seconds=tuple(sample.seconds for sample in outcome.samples),
        other_cpu=tuple(sample.other_cpu for sample in outcome.samples),
        unit=case.unit,
        units=case.units,
        flops=tuple(part.flops for part in work),
        bytes=tuple(part.bytes for part in work),
        numbers={name: float(number) for name, number in numbers.items()},
        **compiled,
    )


def _measure_start(job: Job, case: Start) -> CaseResult:
    """Everything since the parent started this process, whose imports are done by now."""
    from paligemma_jax.benchmark.ours import Compilations

    run = job.run
    jax.local_devices()
    imported = time.time()
    with Compilations() as counted:
        subject = open_subject(run.implementation, job.weights, run.model, run.dtype)
        loaded = time.time()
        case.run(Context(subject, find_model(run.model)))
    end = time.time()
    numbers = {
        "import_seconds": imported - job.spawned,
        "load_seconds": loaded - imported,
        "first_token_seconds": end - loaded,
        "compile_seconds": counted.seconds,
    }
    return CaseResult.of(run, case.name, seconds=(end - job.spawned,), numbers=numbers)


def _held_bytes(implementation: Implementation) -> int:
    """What this process holds with its libraries imported and no model, of ours; else 0.

    Importing is then not a part of loading.
    """
    if implementation in BASELINES:
        with contextlib.suppress(ImportError):  # reported when it is opened
            from transformers import PaliGemmaForConditionalGeneration  # noqa: F401
        return 0
    from paligemma_jax.benchmark.ours import held_bytes

    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    return held_bytes()


def main() -> None:
    """The process."""
    job: Job = pickle.loads(Path(sys.argv[1]).read_bytes())  # written by its parent
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print

    def report(result: CaseResult) -> None:
        print(json.dumps(dataclasses.asdict(result)), file=out, flush=True)

    run_job(job, report)


if __name__ == "__main__":
    main()
