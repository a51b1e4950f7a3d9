"""The parent of all measuring processes: one after the other, the implementations in turn."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from paligemma_jax.benchmark.entry import Entry, Turn
from paligemma_jax.benchmark.equality import Comparison, compare
from paligemma_jax.benchmark.implementation import Kind
from paligemma_jax.benchmark.models import find_model
from paligemma_jax.benchmark.record import Record
from paligemma_jax.benchmark.starting import start_to_first_token
from paligemma_jax.benchmark.train_equality import LossComparison, compare_losses
from paligemma_jax.benchmark.train_plan import TrainEntry, TrainTurn
from paligemma_jax.benchmark.train_worker import TrainJob
from paligemma_jax.benchmark.worker import Job

Progress = Callable[[str, int, int], None]  # what is going on, cases done, cases in all
AnyComparison = Comparison | LossComparison
Found = Callable[[list[Record], list[AnyComparison]], object]
COLD, WARM = "cold start", "warm start"
LONGEST = 24 * 3600.0  # seconds of one process


def run(
    entries: Sequence[Entry | TrainEntry],
    *,
    folder: Path | None,
    on_cpu: bool,
    deadline: float,
    progress: Progress,
    found: Found,
) -> tuple[list[Record], list[AnyComparison]]:
    """Measures everything; checkpoints are kept in `folder`, or removed at the end.

    At the `deadline` (of `time.monotonic`) whatever runs is ended, and nothing more begun. `found`
    is called after each process with all that is known by then.
    """
    with tempfile.TemporaryDirectory(prefix="paligemma-bench-") as temporary:
        work = Path(temporary)
        runner = _Runner(work, folder or work, on_cpu, deadline, progress, found)
        return runner.run(entries)


class _Runner:
    def __init__(
        self,
        work: Path,
        weights: Path,
        on_cpu: bool,
        deadline: float,
        progress: Progress,
        found: Found,
    ):
        self._work, self._weights = work, weights
        self._end = self._deadline = deadline  # of the entry, of all
        self._progress, self._found = progress, found
        self._environment = _environment(on_cpu) | {
            "JAX_COMPILATION_CACHE_DIR": str(work / "compiled")
        }
        self._records: list[Record] = []
        self._comparisons: list[AnyComparison] = []
        self._done = self._total = 0
        self._unavailable: set[str] = set()

    def run(
        self, entries: Sequence[Entry | TrainEntry]
    ) -> tuple[list[Record], list[AnyComparison]]:
        self._total = sum(_steps(entry) for entry in entries)
        for index, entry in enumerate(entries):
            left = self._deadline - time.monotonic()
            shares = [other.share for other in entries[index:]]
            self._end = time.monotonic() + left * shares[0] / sum(shares)
            if self._seconds_left() > 0:
                self._entry(entry)
        self._progress("done", self._total, self._total)
        return self._records, self._comparisons

    def _entry(self, entry: Entry | TrainEntry) -> None:
        weights, before = self._checkpoint(entry), list(self._comparisons)
        for repeat in range(entry.repeats):
            for turn in entry.turns(repeat):
                self._turn(turn, weights)
                model = entry.model
                found = [*compare(self._work, model), *compare_losses(self._records, model)]
                self._comparisons = [*before, *(one for one in found if one not in before)]
                self._found(self._records, self._comparisons)
            if repeat < entry.starts and weights is not None and self._seconds_left() > 0:
                self._starts(entry, weights, repeat)
                self._found(self._records, self._comparisons)

    def _seconds_left(self) -> float:
        return self._end - time.monotonic()

    def _checkpoint(self, entry: Entry | TrainEntry) -> Path | None:
        if not entry.written:
            return None
        from paligemma_jax.benchmark.synthetic import write_checkpoint

        self._progress(f"{entry.model}: writing random weights", self._done, self._total)
        path = self._weights / f"random-{entry.model}"
        return write_checkpoint(path, find_model(entry.model))

    def _turn(self, turn: Turn | TrainTurn, weights: Path | None) -> None:
        job = turn.job(weights, self._work)
        names, before = job.names, self._done
        expected = len(names)
        if job.title in self._unavailable or self._seconds_left() <= 0:
            self._done += expected
            return
        what = f"{job.title}, repeat {turn.repeat + 1}"
        self._progress(f"{what}: {names[0]}", self._done, self._total)
        for record in self._process(job):
            self._records.append(record)
            self._done += 1
            following = names[min(self._done - before, len(names) - 1)]
            self._progress(f"{what}: {following}", self._done, self._total)
            if record.case == job.loading and record.error:
                self._unavailable.add(job.title)
        self._done = before + expected

    def _process(self, job: Job | TrainJob) -> Iterator[Record]:
        """Records of a process of its own, as they come."""
        description, log = self._work / "job.json", self._work / "log.txt"
        description.write_text(json.dumps(job.to_dict()))
        command = [sys.executable, "-m", job.worker, str(description)]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, env=self._environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            assert process.stdout is not None
            alarm = threading.Timer(min(self._seconds_left(), LONGEST), process.kill)
            alarm.start()
            try:
                for line in process.stdout:
                    yield Record.from_dict(json.loads(line))
                code = process.wait()
            finally:
                alarm.cancel()
                process.kill()
                process.wait()
        if self._seconds_left() <= 0:
            yield job.record("process", error="The time was up before it was done.")
        elif code:
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            yield job.record("process", error=f"It ended with exit code {code}: {last[:300]}")

    def _starts(self, entry: Entry | TrainEntry, weights: Path, repeat: int) -> None:
        """A start without any compiled program, then one with those that it has left."""
        dtype = entry.dtypes[0]
        cache = self._work / f"start-{entry.model}-{repeat}"
        about = {"model": entry.model, "kind": Kind.OURS, "dtype": dtype, "repeat": repeat}
        for case in (COLD, WARM):
            self._progress(f"{entry.model}: {case}", self._done, self._total)
            try:
                found = start_to_first_token(
                    weights, dtype, cache, self._environment, self._seconds_left()
                )
            except subprocess.SubprocessError as e:
                said = getattr(e, "stderr", None) or str(e)
                last = (str(said).strip().splitlines() or [""])[-1]
                self._records.append(Record(**about, case=case, error=last[:300]))
            else:
                self._records.append(
                    Record(**about, case=case, seconds=(found.pop("start"),), numbers=found)
                )
            self._done += 1


def _steps(entry: Entry | TrainEntry) -> int:
    turns = [turn for repeat in range(entry.repeats) for turn in entry.turns(repeat)]
    starts = 2 * entry.starts if entry.written else 0
    return sum(len(turn.job(Path(), Path()).names) for turn in turns) + starts


def _environment(on_cpu: bool) -> dict[str, str]:
    """The user's, with this package to be found, and no accelerator if so wanted."""
    here = str(Path(__file__).parents[2])
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [here, *filter(None, [environment.get("PYTHONPATH")])]
    )
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    # Idle threads of PyTorch must not take the cores from another library's.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if on_cpu:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment
