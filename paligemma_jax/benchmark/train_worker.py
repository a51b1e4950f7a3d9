"""One process that measures training: `python -m paligemma_jax.benchmark.train_worker JOB`.

JOB is a file that `TrainJob` describes. Lines of JSON go to standard output, see `worker`.
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any, ClassVar

from paligemma_jax.benchmark.subjects import (
    Kind,
    Precision,
    Record,
    Trainer,
    TrainSteps,
    find_model,
    loss_numbers,
    train,
)
from paligemma_jax.benchmark.worker import Report, serve_job
from paligemma_jax.errors import PaliGemmaError

CEILINGS = "ceilings"


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """What one process is to do.

    Attributes:
      weights: a Hugging Face directory.
      small: measures the machine's ceilings in a moment, which is for trying.
    """

    worker: ClassVar[str] = "paligemma_jax.benchmark.train_worker"

    model: str
    kind: Kind
    dtype: Precision
    repeat: int
    case: TrainSteps
    weights: Path
    small: bool = False

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model} {self.kind} {self.dtype}, {self.case.task}"

    @property
    def names(self) -> list[str]:
        """What is reported, in turn."""
        before = [CEILINGS] if self.kind is Kind.OURS else []
        return [*before, self.loading, self.case.name]

    @property
    def loading(self) -> str:
        """The name of the record of it."""
        return f"load for {self.case.name}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"case": self.case.to_dict(), "weights": str(self.weights)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainJob":
        """Inverse of `to_dict`."""
        return cls(
            values["model"],
            Kind(values["kind"]),
            Precision(values["dtype"]),
            values["repeat"],
            TrainSteps.from_dict(values["case"]),
            Path(values["weights"]),
            values["small"],
        )

    def record(self, case: str, **found: Any) -> Record:
        """A record of this job."""
        return Record(
            model=self.model,
            kind=self.kind,
            dtype=self.dtype,
            repeat=self.repeat,
            case=case,
            task=self.case.task,
            **found,
        )


def run_train_job(job: TrainJob, report: Report) -> None:
    """Loads, then steps; what goes wrong becomes a record too."""
    if job.kind is Kind.OURS:
        from paligemma_jax.benchmark.cases import measure_ceilings

        report(job.record(CEILINGS, numbers=measure_ceilings(job.small)))
    start = time.perf_counter()
    try:
        trainer = _open(job)
    except PaliGemmaError as e:
        report(job.record(job.loading, error=str(e)))
        return
    seconds = time.perf_counter() - start
    report(job.record(job.loading, seconds=(seconds,), others=(0.0,)))
    try:
        report(_measure(job, trainer))
    except Exception as e:  # such as memory that does not suffice
        first = (str(e).splitlines() or [""])[0]
        report(job.record(job.case.name, error=f"{type(e).__name__}: {first[:300]}"))


def _measure(job: TrainJob, trainer: Trainer) -> Record:
    case, config = job.case, find_model(job.model)
    start = time.perf_counter()
    numbers: dict[str, float] = {}
    compiled: dict[str, Any] = {}
    if job.kind is Kind.OURS:
        from paligemma_jax.benchmark.ours import Compilations

        counted = Compilations()
        first = trainer.step()
        counted.stop()
        compiled = {"compilations": sum(counted.own.values()), "compile_seconds": counted.seconds}
    else:
        first = trainer.step()
    numbers["first_step_seconds"] = time.perf_counter() - start
    trainer.forget_peak()
    trained = train(trainer, case)
    peak = trainer.peak_bytes()
    if job.kind is Kind.OURS:
        numbers |= _told_by_jax(trainer)
    operations, tokens = case.operations(config), config.img.num_patches + case.text
    return job.record(
        case.name,
        seconds=tuple(sample.seconds for sample in trained.samples),
        others=tuple(sample.others for sample in trained.samples),
        rows=case.batch,
        flops=(operations,),
        bytes=(0.0,),
        peak_bytes=peak,
        numbers=numbers
        | {"tokens_a_sample": float(tokens)}
        | loss_numbers([first, *trained.losses][: case.compared]),
        **compiled,
    )


def _told_by_jax(trainer: Any) -> dict[str, float]:
    from paligemma_jax.training.logging import device_peak

    peak = device_peak()
    return trainer.compiled_bytes() | ({} if peak is None else {"datasheet_rate": peak})


def _open(job: TrainJob) -> Trainer:
    if job.kind is Kind.OURS:
        from paligemma_jax.benchmark.ours import open_our_trainer

        return open_our_trainer(job.weights, job.dtype, job.case)
    from paligemma_jax.benchmark.huggingface import open_huggingface_trainer

    with contextlib.suppress(ImportError):  # said later; importing is no part of loading
        from transformers import PaliGemmaForConditionalGeneration  # noqa: F401
    return open_huggingface_trainer(job.weights, find_model(job.model), job.dtype, job.case)


def main() -> None:
    """The process."""
    serve_job(lambda job, report: run_train_job(TrainJob.from_dict(job), report))


if __name__ == "__main__":
    main()
