"""`pg.bench`: a whole run, in one call."""

import enum
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from paligemma_jax.benchmark.entry import Entry
from paligemma_jax.benchmark.environment import (
    describe_environment,
    find_accelerator,
    missing_peer,
)
from paligemma_jax.benchmark.implementation import PEERS, Kind, Precision
from paligemma_jax.benchmark.plan import entries
from paligemma_jax.benchmark.record import Record
from paligemma_jax.benchmark.result import BenchmarkResult
from paligemma_jax.benchmark.run import AnyComparison, Progress, run
from paligemma_jax.benchmark.task import TRAINING, Task
from paligemma_jax.benchmark.train_plan import BESIDE_ANSWERING, TrainEntry, train_entries
from paligemma_jax.errors import ConfigError

Choice = TypeVar("Choice", bound=enum.StrEnum)


def bench(
    size: str = "cpu",
    *,
    tasks: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    implementations: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    repeats: int | None = None,
    quick: bool = False,
    minutes: float = math.inf,
    json: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Measures this library beside Hugging Face's implementation and the machine's limits.

    Weights are random. Outputs are compared first; where they differ, no speed counts. Nothing else
    should run meanwhile: samples during which other processes take CPU time are left out.

    Args:
      size: "cpu" (about fourteen minutes), "gpu" (needs one), or "tiny" to try it.
      tasks: of "answer", "full" (training of all weights) and "lora"; None: the size's own, which
        is to answer, and on a GPU some training.
      models: instead of the size's own: published names, "mid" or "tiny".
      implementations: of "ours", "scanned", "huggingface", "huggingface-compiled".
      dtypes: of "float32", "bfloat16", and for ours alone "int8", "int8-dynamic", "int4".
      repeats: processes of each implementation; they alternate.
      quick: one repeat of the most important cases.
      minutes: when to stop; what is measured by then is what there is. Every model has its share of
        them, and leaves what it does not need to the next.
      json: a file for everything that was measured, written anew after every process.
      weights: a directory to keep the random checkpoints in, for the next run.
      progress: called with what is being measured, cases done and cases in all.

    Raises:
      ConfigError: for names that do not exist, and "gpu" without one.
    """
    accelerator = find_accelerator() if size == "gpu" else None
    if size == "gpu" and accelerator is None:
        raise ConfigError(
            'The size "gpu" needs a GPU that JAX can use, and there is none. Another size fits. '
            "Run: paligemma bench --size cpu"
        )
    chosen = _chosen(
        size,
        _members(Task, tasks),
        models=models,
        kinds=_members(Kind, implementations),
        dtypes=_members(Precision, dtypes),
        repeats=repeats,
        quick=quick,
    )
    missing = missing_peer()
    if missing:
        chosen = [left for entry in chosen if (left := entry.without(PEERS)).kinds]
    environment = describe_environment(accelerator)
    began = time.monotonic()

    def result(records: list[Record], comparisons: list[AnyComparison]) -> BenchmarkResult:
        whole = BenchmarkResult(
            size=size,
            on_cpu=accelerator is None,
            environment=environment | {"minutes": f"{(time.monotonic() - began) / 60:.1f}"},
            records=tuple(records),
            comparisons=tuple(comparisons),
            notes=(missing,) if missing else (),
        )
        if json is not None:
            whole.save(json)
        return whole

    records, comparisons = run(
        chosen,
        folder=None if weights is None else Path(weights),
        on_cpu=accelerator is None,
        deadline=began + 60 * minutes,
        progress=progress or (lambda what, done, total: None),
        found=result,
    )
    return result(records, comparisons)


def _chosen(size: str, tasks: list[Task] | None, **narrowed: Any) -> list[Entry | TrainEntry]:
    """The entries of these tasks, in turn."""
    if tasks is None:
        answering = entries(size, **narrowed)
        if any(narrowed.values()):
            return [*answering]
        return [*answering, *BESIDE_ANSWERING.get(size, ())]
    chosen: list[Entry | TrainEntry] = []
    if Task.ANSWER in tasks:
        chosen += entries(size, **narrowed)
    wanted = [task for task in TRAINING if task in tasks]
    return [*chosen, *(train_entries(size, wanted, **narrowed) if wanted else ())]


def _members(choices: type[Choice], names: Sequence[str] | None) -> list[Choice] | None:
    """Enum members of their names; raises ConfigError for others."""
    if names is None:
        return None
    known = [choice.value for choice in choices]
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} cannot be measured. {', '.join(known)} fit.")
    return [choices(name) for name in names]
