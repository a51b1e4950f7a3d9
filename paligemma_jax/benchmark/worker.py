"""One process that measures one implementation: `python -m paligemma_jax.benchmark.worker JOB`.

JOB is a file that `Job` describes. A line of JSON (see `record`) goes to standard output for each
case as soon as it is done; whatever else is printed goes to standard error.

The process of one job of a benchmark: a JSON file in, a line of JSON for each record out.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from paligemma_jax.benchmark.cases import Case, Outcome, Subject, case_from_dict, case_to_dict
from paligemma_jax.benchmark.subjects import (
    PEERS,
    Implementation,
    Kind,
    Precision,
    Record,
    find_model,
    most_resident,
    open_implementation,
)
from paligemma_jax.errors import ConfigError, PaliGemmaError

Report = Callable[[Record], None]


def serve_job(run: Callable[[dict[str, Any], Report], None]) -> None:
    """Calls `run` with the job in the file that the command line names, and what takes records."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print

    def report(record: Record) -> None:
        print(json.dumps(record.to_dict()), file=out, flush=True)

    run(job, report)


LOAD = "load"


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process is to do.

    Attributes:
      weights: a Hugging Face directory; None makes random weights on the device.
      arrays: the directory for what is to be compared.
    """

    worker: ClassVar[str] = "paligemma_jax.benchmark.worker"

    model: str
    kind: Kind
    dtype: Precision
    repeat: int
    cases: tuple[Case, ...]
    weights: Path | None
    arrays: Path

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model} {self.kind} {self.dtype}"

    @property
    def loading(self) -> str:
        """The name of the record of it."""
        return LOAD

    @property
    def names(self) -> list[str]:
        """What is reported, in turn."""
        return [self.loading, *(case.name for case in self.cases)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {
            "cases": [case_to_dict(case) for case in self.cases],
            "weights": None if self.weights is None else str(self.weights),
            "arrays": str(self.arrays),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Job":
        """Inverse of `to_dict`."""
        return cls(
            values["model"],
            Kind(values["kind"]),
            Precision(values["dtype"]),
            values["repeat"],
            tuple(case_from_dict(case) for case in values["cases"]),
            None if values["weights"] is None else Path(values["weights"]),
            Path(values["arrays"]),
        )

    def record(self, case: str, **found: Any) -> Record:
        """A record of this job."""
        return Record(
            model=self.model,
            kind=self.kind,
            dtype=self.dtype,
            repeat=self.repeat,
            case=case,
            **found,
        )

    @property
    def arrays_file(self) -> Path:
        """Where the arrays to compare are."""
        return self.arrays / f"{self.model}-{self.kind}-{self.dtype}.npz"


def run_job(job: Job, report: Report) -> None:
    """Loads, then measures case after case; what goes wrong becomes a record too."""
    config = find_model(job.model)
    bare = _bare_bytes(job.kind)
    start = time.perf_counter()
    try:
        implementation = _open(job)
    except PaliGemmaError as e:
        report(job.record(LOAD, error=str(e)))
        return
    seconds = time.perf_counter() - start
    report(job.record(LOAD, seconds=(seconds,), others=(0.0,), peak_bytes=most_resident()))
    subject = Subject(implementation, config, job.kind is not Kind.HUGGING_FACE, bare)
    for case in job.cases:
        try:
            report(_measure(job, case, subject))
        except Exception as e:  # the other cases may work: such as memory for a smaller batch
            first = (str(e).splitlines() or [""])[0]
            report(job.record(case.name, error=f"{type(e).__name__}: {first[:300]}"))


def _measure(job: Job, case: Case, subject: Subject) -> Record:
    compiled: dict[str, Any] = {}
    if job.kind in (Kind.OURS, Kind.SCANNED):
        from paligemma_jax.benchmark.ours import Compilations

        counted = Compilations()
        outcome = case.run(subject)
        counted.stop()
        compiled = {"compilations": sum(counted.own.values()), "compile_seconds": counted.seconds}
    else:
        outcome = case.run(subject)
    return _record(job, case, subject, outcome, compiled)


def _record(
    job: Job, case: Case, subject: Subject, outcome: Outcome, compiled: dict[str, Any]
) -> Record:
    if outcome.arrays:
        np.savez(job.arrays_file, allow_pickle=False, **outcome.arrays)
    work = case.work(subject.config, job.dtype)
    return job.record(
        case.name,
        seconds=tuple(sample.seconds for sample in outcome.samples),
        others=tuple(sample.others for sample in outcome.samples),
        rows=case.rows,
        flops=tuple(part.flops for part in work),
        bytes=tuple(part.bytes for part in work),
        peak_bytes=subject.implementation.peak_bytes(),
        numbers={name: float(number) for name, number in outcome.numbers.items()},
        **compiled,
    )


def _open(job: Job) -> Implementation:
    if job.weights is not None:
        return open_implementation(job.kind, job.weights, job.dtype)
    if job.kind is not Kind.OURS:
        raise ConfigError(
            f"{job.kind} needs a checkpoint to load, and none of {job.model} is written. "
            "This library alone can be measured without."
        )
    from paligemma_jax.benchmark.ours import Ours, random_model

    return Ours(random_model(find_model(job.model), job.dtype))


def _bare_bytes(kind: Kind) -> int:
    """What the process holds with its libraries imported and no model, of ours; 0 for a peer.

    Importing is then not a part of loading.
    """
    if kind in PEERS:
        with contextlib.suppress(ImportError):  # said later
            from transformers import PaliGemmaForConditionalGeneration  # noqa: F401
        return 0
    import jax.numpy as jnp

    from paligemma_jax.benchmark.ours import held_bytes

    (jnp.zeros(8) + 1).block_until_ready()
    return held_bytes()


def main() -> None:
    """The process."""
    serve_job(lambda job, report: run_job(Job.from_dict(job), report))


if __name__ == "__main__":
    main()
