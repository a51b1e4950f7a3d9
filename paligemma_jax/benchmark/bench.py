"""`pg.bench`: all measuring processes, one after the other, the implementations in turn."""

import datetime
import enum
import importlib.metadata
import json as json_module
import math
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from paligemma_jax import __version__
from paligemma_jax.benchmark import BASELINES, Implementation, Precision, Task
from paligemma_jax.benchmark.cases import Start
from paligemma_jax.benchmark.plan import Job, Run, Suite, plan
from paligemma_jax.benchmark.random_checkpoint import write_checkpoint
from paligemma_jax.benchmark.report import BenchmarkResult
from paligemma_jax.benchmark.results import CaseResult, Comparison, compare, outputs_file
from paligemma_jax.benchmark.subjects import find_model
from paligemma_jax.errors import ConfigError

Progress = Callable[[str, int, int], None]  # what is going on, cases done, cases in all
Found = Callable[[list[CaseResult], list[Comparison]], object]
Name = TypeVar("Name", bound=enum.StrEnum)
_WORKER = "paligemma_jax.benchmark.worker"
_LONGEST = 24 * 3600.0  # seconds of one process
_PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")
_PROBE = "import jax; print(jax.default_backend(), jax.local_devices()[0].device_kind, sep='\\n')"


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
    """Measures this library beside Hugging Face's implementation and the machine's roofline.

    Weights are random. Outputs are compared first; where they differ, no speed counts. Nothing else
    should run meanwhile: samples during which other processes take CPU time are filtered out.

    Args:
      size: "cpu" (about fourteen minutes), "gpu" (needs one), or "tiny" to try it.
      tasks: of "inference", "full" (training of all weights) and "lora"; None: the size's own,
        which is inference, and on a GPU some training.
      models: instead of the size's own: published names, "4-layer-proxy", "2-layer-proxy" or
        "tiny".
      implementations: of "paligemma-jax", "big-vision-style", "huggingface",
        "huggingface-compiled".
      dtypes: of "float32", "bfloat16", and for this library alone "int8", "int8-dynamic", "int4".
      repeats: processes of each implementation; they alternate.
      quick: one repeat of the most important cases.
      minutes: when to stop; what is measured by then is what there is. Every suite has a part of
        them, and leaves what it does not need to the next.
      json: a file for everything that was measured, written anew after every process.
      weights: a directory to keep the random checkpoints in, for the next run.
      progress: called with what is being measured, cases done and cases in all.

    Raises:
      ConfigError: for unknown names, and for "gpu" without one.
    """
    accelerator = find_accelerator() if size == "gpu" else None
    if size == "gpu" and accelerator is None:
        raise ConfigError(
            'expected a GPU that JAX can use for the size "gpu", got none. '
            "Run: paligemma bench --size cpu"
        )
    suites = plan(
        size,
        _members(Task, tasks),
        models=models,
        implementations=_members(Implementation, implementations),
        dtypes=_members(Precision, dtypes),
        repeats=repeats,
        quick=quick,
    )
    notes: tuple[str, ...] = ()
    if not (_version("torch") and _version("transformers")):
        suites = [left for s in suites if (left := s.without(BASELINES)).implementations]
        notes = (
            "Hugging Face's implementation is not installed, so only this library is measured. "
            'Install it with: pip install "paligemma-jax[parity]"',
        )
    environment = _describe_environment(accelerator)
    began = time.monotonic()

    def found(results: list[CaseResult], comparisons: list[Comparison]) -> BenchmarkResult:
        whole = BenchmarkResult(
            size=size,
            on_cpu=accelerator is None,
            environment=environment | {"minutes": f"{(time.monotonic() - began) / 60:.1f}"},
            results=tuple(results),
            comparisons=tuple(comparisons),
            notes=notes,
        )
        if json is not None:
            whole.save(json)
        return whole

    with tempfile.TemporaryDirectory(prefix="paligemma-bench-") as work:
        runner = Runner(
            Path(work),
            weights=Path(work if weights is None else weights),
            on_cpu=accelerator is None,
            deadline=began + 60 * minutes,
            progress=progress or (lambda what, done, total: None),
            found=found,
        )
        runner.run(suites)
    return found(runner.results, runner.comparisons)


def find_accelerator() -> str | None:
    """What JAX computes on by itself, None for a CPU.

    Asked in another process: this one would take the memory that the measuring ones need.
    """
    command = [sys.executable, "-c", _PROBE]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    return None if len(found) < 2 or found[0] == "cpu" else found[1]


class Runner:
    """The parent of all measuring processes.

    At the `deadline` (of `time.monotonic`) the running process is ended and no other one started.
    `found` is called after each process with all that is known by then.
    """

    def __init__(
        self,
        work: Path,
        *,
        weights: Path,
        on_cpu: bool,
        deadline: float,
        progress: Progress,
        found: Found,
    ):
        self._work, self._weights = work, weights
        self._end = self._deadline = deadline  # of the suite, of all
        self._progress, self._found = progress, found
        self._environment = _environment(on_cpu, work / "compiled")
        self.results: list[CaseResult] = []
        self.comparisons: list[Comparison] = []
        self._done = self._total = 0
        self._unavailable: set[str] = set()

    def run(self, suites: Sequence[Suite]) -> None:
        """Measures everything."""
        self._total = sum(
            2 * suite.starts * suite.checkpoint
            + sum(1 + len(run.cases) for n in range(suite.repeats) for run in suite.runs(n))
            for suite in suites
        )
        for index, suite in enumerate(suites):
            left, seconds = self._deadline - time.monotonic(), [s.seconds for s in suites[index:]]
            self._end = time.monotonic() + left * seconds[0] / sum(seconds)
            if self._seconds_left() > 0:
                self._run_suite(suite)
        self._progress("done", self._total, self._total)

    def _run_suite(self, suite: Suite) -> None:
        weights = None
        if suite.checkpoint:
            self._progress(f"{suite.model}: writing random weights", self._done, self._total)
            weights = self._weights / f"random-{suite.model}"
            weights = write_checkpoint(weights, find_model(suite.model))
        earlier = [c for c in self.comparisons if c.model != suite.model]
        for repeat in range(suite.repeats):
            runs = [(run, self._environment) for run in suite.runs(repeat)]
            if repeat < suite.starts and weights is not None:
                # A start without any compiled program, then one with those that it has left.
                cache = str(self._work / f"start-{suite.model}-{repeat}")
                environment = self._environment | {
                    "JAX_COMPILATION_CACHE_DIR": cache,
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # as the command has it
                }
                about = (suite.model, Implementation.OURS, suite.dtypes[0], repeat)
                runs += [(Run(*about, (Start(warm),)), environment) for warm in (False, True)]
            for run, environment in runs:
                self._run(run, weights, environment)
                self.comparisons = [*earlier, *compare(self._work, suite.model)]
                self._found(self.results, self.comparisons)

    def _seconds_left(self) -> float:
        return self._end - time.monotonic()

    def _run(self, run: Run, weights: Path | None, environment: dict[str, str]) -> None:
        started = isinstance(run.cases[0], Start)
        names = [*([] if started else [run.load]), *(case.name for case in run.cases)]
        before = self._done
        if run.title not in self._unavailable and self._seconds_left() > 0:
            what = f"{run.title}, repeat {run.repeat + 1}"
            self._progress(f"{what}: {names[0]}", self._done, self._total)
            for result in self._process(run, weights, environment):
                self.results.append(result)
                self._done += 1
                following = names[min(self._done - before, len(names) - 1)]
                self._progress(f"{what}: {following}", self._done, self._total)
                if result.case == run.load and result.error:
                    self._unavailable.add(run.title)
        self._done = before + len(names)

    def _process(
        self, run: Run, weights: Path | None, environment: dict[str, str]
    ) -> Iterator[CaseResult]:
        """Results of a process of its own, as they come."""
        description, log = self._work / "job", self._work / "log.txt"
        outputs = outputs_file(self._work, run.model, run.task, run.dtype, run.implementation)
        description.write_bytes(pickle.dumps(Job(run, weights, outputs, time.time())))
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", _WORKER, str(description)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert process.stdout is not None
            alarm = threading.Timer(min(self._seconds_left(), _LONGEST), process.kill)
            alarm.start()
            try:
                for line in process.stdout:
                    yield CaseResult.from_dict(json_module.loads(line))
                code = process.wait()
            finally:
                alarm.cancel()
                process.kill()
                process.wait()
        if self._seconds_left() <= 0:
            yield CaseResult.of(run, "process", error="the time was up before it was done")
        elif code:
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            yield CaseResult.of(run, "process", error=f"exit code {code}: {last[:300]}")


def _environment(on_cpu: bool, cache: Path) -> dict[str, str]:
    """The user's, with this package to be found, and no accelerator if it is not to be used."""
    environment = dict(os.environ)
    path = [str(Path(__file__).parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    # Idle threads of PyTorch must not take the cores from another library's.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if on_cpu:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _describe_environment(accelerator: str | None) -> dict[str, str]:
    """Device, versions, date and load average, as short texts."""
    load = " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": accelerator or _processor(),
        "load average before": load,
        "paligemma-jax": __version__,
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
    }


def _processor() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"CPU, {name}, {cores} cores"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _members(choices: type[Name], names: Sequence[str] | None) -> list[Name] | None:
    """Enum members by name; raises ConfigError for others."""
    known = [choice.value for choice in choices]
    for name in names or ():
        if name not in known:
            raise ConfigError(f"expected one of {', '.join(known)}, got {name!r}")
    return None if names is None else [choices(name) for name in names]
