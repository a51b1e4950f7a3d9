"""`pg.bench`: a whole run, in one call.

What a run consists of: entries, of which each is a model, and turns, which are processes.

What is measured on which kind of machine.

Which entries of a size are measured, as narrowed by who asks.

On what and with what a run was made.

Which implementations train which models, at the sizes there are.

The parent of all measuring processes: one after the other, the implementations in turn.
"""

import dataclasses
import datetime
import enum
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from paligemma_jax import __version__
from paligemma_jax.benchmark.cases import (
    Case,
    Decode,
    DecodeMemory,
    EncodeImages,
    Equality,
    FirstToken,
    LongAnswer,
    MeasureCeilings,
    MixedLengths,
)
from paligemma_jax.benchmark.report import (
    COLD,
    WARM,
    BenchmarkResult,
    Comparison,
    LossComparison,
    compare,
    compare_losses,
)
from paligemma_jax.benchmark.starting import start_to_first_token
from paligemma_jax.benchmark.subjects import (
    PEERS,
    TRAINING,
    Effort,
    Kind,
    Precision,
    Record,
    Task,
    TrainSteps,
    find_model,
)
from paligemma_jax.benchmark.train_worker import TrainJob
from paligemma_jax.benchmark.worker import Job
from paligemma_jax.errors import ConfigError

ENTRY_F32 = Precision.FLOAT32
_entry_OF_INTEGERS = (MeasureCeilings, Decode)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One process: an implementation of a model in a precision, in one of the repeats."""

    model: str
    kind: Kind
    dtype: Precision
    repeat: int
    cases: tuple[Case, ...]

    def job(self, weights: Path | None, arrays: Path) -> Job:
        """What the process is told."""
        return Job(**vars(self), weights=weights, arrays=arrays)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model at a size.

    Attributes:
      quantized: precisions of integers that only this library decodes in, batch by batch.
      written: weights go through a checkpoint, so that the peers can have the same.
      once: cases of the first repeat only, ours and the peers'.
      each: cases of every repeat.
      compared: whether outputs are compared before all else; once for a model is enough.
      share: of the time that is left, beside those of the entries after it.
      ours_once: cases that only this library is asked, in the first repeat, in the first precision.
    """

    model: str
    kinds: tuple[Kind, ...]
    dtypes: tuple[Precision, ...]
    each: tuple[Case, ...]
    once: tuple[Case, ...] = ()
    ours_once: tuple[Case, ...] = ()
    quantized: tuple[Precision, ...] = ()
    written: bool = True
    repeats: int = 3
    starts: int = 1
    small: bool = False
    share: float = 1.0
    compared: bool = True

    def without(self, kinds: Sequence[Kind]) -> "Entry":
        """For where some implementations are not installed."""
        left = tuple(kind for kind in self.kinds if kind not in kinds)
        return dataclasses.replace(self, kinds=left)

    def turns(self, repeat: int) -> list[Turn]:
        """The processes of one repeat; every other repeat goes the other way around."""
        turns = [
            self._turn(kind, dtype, repeat)
            for dtype in self.dtypes
            for kind in self.kinds
            if kind is Kind.OURS or not dtype.quantized
        ]
        compared = self._compared(repeat) and Kind.HUGGING_FACE in self.kinds
        if compared and ENTRY_F32 not in self.dtypes:  # what less precise outputs are held against
            turns.append(Turn(self.model, Kind.HUGGING_FACE, ENTRY_F32, 0, (Equality(),)))
        if Kind.OURS in self.kinds:
            turns += [self._turn(Kind.OURS, dtype, repeat) for dtype in self.quantized]
        idle = (MeasureCeilings(self.small),)
        turns = [turn for turn in turns if turn.cases not in ((), idle)]
        return turns[::-1] if repeat % 2 else turns

    def _turn(self, kind: Kind, dtype: Precision, repeat: int) -> Turn:
        return Turn(self.model, kind, dtype, repeat, self._cases(kind, dtype, repeat))

    def _compared(self, repeat: int) -> bool:
        return self.written and self.compared and repeat == 0

    def _cases(self, kind: Kind, dtype: Precision, repeat: int) -> tuple[Case, ...]:
        if kind is Kind.SCANNED:
            if dtype is not ENTRY_F32:
                return ()
            decode = [c for c in self.each if isinstance(c, Decode) and c.batch == 1]
            return tuple(decode if repeat < 2 else ())
        first = repeat == 0
        if kind is Kind.HUGGING_FACE_COMPILED:
            return self._compiled() if first else ()
        of_first = first and dtype is (*self.dtypes, *self.quantized)[0]
        own = self.ours_once if kind is Kind.OURS and of_first else ()
        # Memory before all else: what other cases compile stays resident.
        cases: list[Case] = [case for case in own if isinstance(case, DecodeMemory)]
        cases += [Equality()] if self._compared(repeat) else []
        if kind is Kind.OURS:
            cases.append(MeasureCeilings(self.small))
        cases += self.each
        if first:
            cases += self.once
        cases += [case for case in own if case not in cases]
        if dtype in self.quantized:
            cases = [case for case in cases if isinstance(case, _entry_OF_INTEGERS)]
        return tuple(cases)

    def _compiled(self) -> tuple[Case, ...]:
        """Once and of one prompt: torch.compile takes a minute for every new shape."""
        cases = [case for case in self.each if isinstance(case, Decode | FirstToken)]
        return (Equality(), *(case for case in cases if case.batch == 1))


SIZES_F32, SIZES_BF16 = Precision.FLOAT32, Precision.BFLOAT16
INTEGERS = (Precision.INT8, Precision.INT4)

_TRIAL = Effort(2, 2, 0)
_TINY = Entry(
    "tiny",
    (Kind.OURS, Kind.SCANNED, Kind.HUGGING_FACE),
    (SIZES_F32,),
    each=(Decode(1, 32, _TRIAL), EncodeImages(1, _TRIAL), FirstToken(1, _TRIAL)),
    ours_once=(LongAnswer(4, 16, _TRIAL), MixedLengths(), DecodeMemory()),
    repeats=1,
    small=True,
)
_CPU = Entry(
    "mid",
    (Kind.OURS, Kind.SCANNED, Kind.HUGGING_FACE),
    (SIZES_F32, SIZES_BF16),
    quantized=(Precision.INT8,),
    each=(Decode(1, 32, Effort(3, 3)), FirstToken(1), EncodeImages(1, Effort(seconds=2))),
    once=(
        FirstToken(8, Effort(1, 1, 0)),
        Decode(8, 32, Effort(2, 2)),
        EncodeImages(8, Effort(2, 2)),
    ),
    ours_once=(LongAnswer(), MixedLengths(), DecodeMemory(32)),
)

# On GPUs compiling takes longest, so there are few shapes, and memory is that of the same programs.
# What matters most comes first: the time may be up before the end. Shares are about the seconds
# that an entry should take.
_MEMORY = DecodeMemory(64)
_FIRST_3B = Entry(
    "paligemma-3b-pt-224",
    (Kind.OURS, Kind.HUGGING_FACE),
    (SIZES_BF16,),
    each=(Decode(1), FirstToken(1), EncodeImages(1)),
    ours_once=(_MEMORY,),
    repeats=1,
    starts=0,
    share=100,
)
_MORE_3B = dataclasses.replace(
    _FIRST_3B,
    each=(Decode(8), FirstToken(8), EncodeImages(8)),
    ours_once=(Decode(64), EncodeImages(32), LongAnswer(), MixedLengths()),
    starts=1,
    compared=False,
)
_FIRST_3B_OF_2 = dataclasses.replace(_FIRST_3B, model="paligemma2-3b-pt-224")
_OURS = Entry(
    "paligemma2-10b-pt-224",
    (Kind.OURS,),
    (SIZES_BF16,),
    each=(Decode(1), FirstToken(1), Decode(8), FirstToken(8)),
    ours_once=(_MEMORY, Decode(64)),
    written=False,
    repeats=1,
    starts=0,
    share=60,
)
_sizes_OF_INTEGERS = dataclasses.replace(
    _OURS,
    model="paligemma-3b-pt-224",
    dtypes=(),
    quantized=INTEGERS,
    each=(Decode(1), Decode(8)),
    ours_once=(),
)
_LARGER = dataclasses.replace(
    _OURS, each=(FirstToken(1), FirstToken(8), Decode(1)), ours_once=(), share=40
)
_sizes_GPU = [
    _FIRST_3B,
    _FIRST_3B_OF_2,
    _OURS,
    dataclasses.replace(_OURS, model="paligemma2-28b-pt-224", share=90),
    dataclasses.replace(
        _FIRST_3B,
        kinds=(Kind.HUGGING_FACE_COMPILED,),
        each=(Decode(1), FirstToken(1)),
        ours_once=(),
        compared=False,
    ),
    dataclasses.replace(_LARGER, model="paligemma-3b-pt-448"),
    dataclasses.replace(_LARGER, model="paligemma-3b-pt-896"),
    _sizes_OF_INTEGERS,
    dataclasses.replace(_sizes_OF_INTEGERS, model="paligemma2-28b-pt-224", each=(Decode(1),)),
    _MORE_3B,
    dataclasses.replace(
        _MORE_3B, model="paligemma2-3b-pt-224", ours_once=(Decode(64), EncodeImages(32)), starts=0
    ),
]

SIZES: dict[str, list[Entry]] = {"tiny": [_TINY], "cpu": [_CPU], "gpu": _sizes_GPU}


def entries(
    size: str,
    *,
    models: Sequence[str] | None = None,
    kinds: Sequence[Kind] | None = None,
    dtypes: Sequence[Precision] | None = None,
    repeats: int | None = None,
    quick: bool = False,
) -> list[Entry]:
    """What is measured at a size; the other arguments narrow or change that.

    A model or kind that the size does not have is measured as its first one is; `dtypes` stand in
    for an entry's own. Raises ConfigError for names that do not exist.
    """
    if size not in SIZES:
        raise ConfigError(f"There is no size {size!r}. {', '.join(SIZES)} fit.")
    chosen = SIZES[size]
    if models is not None:
        chosen = [entry for model in models for entry in _of_model(chosen, model)]
    for entry in chosen:
        find_model(entry.model)
    if kinds:
        chosen = _with_kinds(chosen, kinds)
    if dtypes:
        chosen = _with_dtypes(chosen, dtypes)
    if repeats:
        chosen = [dataclasses.replace(entry, repeats=repeats) for entry in chosen]
    return _quick(chosen) if quick else chosen


def _of_model(chosen: Sequence[Entry], model: str) -> list[Entry]:
    """The size's own entries of a model, else those of its first model."""
    own = [entry for entry in chosen if entry.model == model]
    like_first = [entry for entry in chosen if entry.model == chosen[0].model]
    return own or [dataclasses.replace(entry, model=model) for entry in like_first]


def _with_kinds(chosen: Sequence[Entry], kinds: Sequence[Kind]) -> list[Entry]:
    """Of each entry those of its own; those that a model has nowhere go into its first entry."""
    known = {(entry.model, kind) for entry in chosen for kind in entry.kinds}
    narrowed, begun = [], set()
    for entry in chosen:
        first = entry.model not in begun
        begun.add(entry.model)
        own = [k for k in kinds if k in entry.kinds or (first and (entry.model, k) not in known)]
        if own:
            narrowed.append(dataclasses.replace(entry, kinds=tuple(own)))
    return narrowed


def _with_dtypes(chosen: Sequence[Entry], dtypes: Sequence[Precision]) -> list[Entry]:
    """All of them, in the entries that do more than to decode with integers."""
    return [
        dataclasses.replace(entry, dtypes=tuple(dtypes), quantized=())
        for entry in chosen
        if entry.dtypes
    ]


def _quick(chosen: Sequence[Entry]) -> list[Entry]:
    """One repeat of each model's first entry, which has what matters most."""
    by_model: dict[str, Entry] = {}
    for entry in chosen:
        by_model.setdefault(entry.model, entry)
    return [
        dataclasses.replace(
            entry,
            kinds=tuple(kind for kind in entry.kinds if kind is not Kind.SCANNED),
            repeats=1,
            starts=0,
            once=(),
            ours_once=tuple(case for case in entry.ours_once if isinstance(case, DecodeMemory)),
        )
        for entry in by_model.values()
    ]


PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")
_PROBE = "import jax; print(jax.default_backend(), jax.local_devices()[0].device_kind, sep='\\n')"


def describe_environment(accelerator: str | None) -> dict[str, str]:
    """Device, versions, date and load average, as short texts."""
    load = " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": accelerator or _processor(),
        "load average before": load,
        "paligemma-jax": __version__,
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
    }


def find_accelerator() -> str | None:
    """What JAX computes on by itself, None for a CPU.

    Asked in another process: this one would take the memory that the measuring ones need.
    """
    command = [sys.executable, "-c", _PROBE]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    return None if len(found) < 2 or found[0] == "cpu" else found[1]


def missing_peer() -> str | None:
    """The line that says that Hugging Face's implementation is not installed; else None."""
    if _version("torch") and _version("transformers"):
        return None
    return (
        "Hugging Face's implementation is not installed, so only this library is measured. "
        'Install it with: pip install "paligemma-jax[parity]"'
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"CPU, {name}, {cores} cores"


KINDS = (Kind.OURS, Kind.HUGGING_FACE)
DTYPES = (Precision.FLOAT32, Precision.BFLOAT16)
TRAIN_PLAN_F32, TRAIN_PLAN_BF16 = DTYPES


@dataclasses.dataclass(frozen=True)
class TrainTurn:
    """One process: an implementation that trains a model in one way, in one of the repeats."""

    model: str
    kind: Kind
    dtype: Precision
    repeat: int
    case: TrainSteps
    small: bool

    def job(self, weights: Path | None, arrays: Path) -> TrainJob:
        """What the process is told; `arrays` are for those that answer."""
        assert weights is not None, "training begins with a checkpoint"
        return TrainJob(**vars(self), weights=weights)


@dataclasses.dataclass(frozen=True)
class TrainEntry:
    """A model at a size.

    Attributes:
      dtypes: of activations and frozen weights.
      share: as of an `Entry`.
      small: measures the machine's ceilings in a moment, which is for trying.
    """

    model: str
    kinds: tuple[Kind, ...]
    dtypes: tuple[Precision, ...]
    cases: tuple[TrainSteps, ...]
    repeats: int = 3
    share: float = 1.0
    small: bool = False
    written: bool = True
    starts: int = 0

    def without(self, kinds: Sequence[Kind]) -> "TrainEntry":
        """For where some implementations are not installed."""
        left = tuple(kind for kind in self.kinds if kind not in kinds)
        return dataclasses.replace(self, kinds=left)

    def turns(self, repeat: int) -> list[TrainTurn]:
        """The processes of one repeat; every other repeat goes the other way around."""
        turns = [
            TrainTurn(self.model, kind, dtype, repeat, case, self.small)
            for dtype in self.dtypes
            for case in self.cases
            for kind in self.kinds
        ]
        return turns[::-1] if repeat % 2 else turns


def train_entries(
    size: str,
    tasks: Sequence[Task],
    *,
    models: Sequence[str] | None = None,
    kinds: Sequence[Kind] | None = None,
    dtypes: Sequence[Precision] | None = None,
    repeats: int | None = None,
    quick: bool = False,
) -> list[TrainEntry]:
    """What is trained at a size, of `tasks`; the other arguments narrow or change that.

    Raises ConfigError for names that do not exist or that nothing is trained with.
    """
    if size not in TRAIN_SIZES:
        raise ConfigError(f"There is no size {size!r}. {', '.join(TRAIN_SIZES)} fit.")
    _check(kinds, KINDS, "trained with")
    _check(dtypes, DTYPES, "trained in")
    chosen = TRAIN_SIZES[size]
    if models is not None:
        by_model = {entry.model: entry for entry in chosen}
        chosen = [by_model.get(m, dataclasses.replace(chosen[0], model=m)) for m in models]
    for entry in chosen:
        find_model(entry.model)
    changes = {
        "kinds": tuple(kinds or ()),
        "dtypes": tuple(dtypes or ()),
        "repeats": 1 if quick else repeats,
    }
    given = {name: value for name, value in changes.items() if value}
    return [
        dataclasses.replace(
            entry, cases=tuple(case for case in entry.cases if case.task in tasks), **given
        )
        for entry in chosen
    ]


def _check(names: Sequence[str] | None, known: Sequence[str], how: str) -> None:
    for name in names or ():
        if name not in known:
            raise ConfigError(
                f"Nothing is {how} {name} here. {', '.join(known)} fit. Choose one of them, or "
                "measure answering: --task answer"
            )


def _cases(batch: int, effort: Effort) -> tuple[TrainSteps, ...]:
    return tuple(TrainSteps(task, batch, effort=effort) for task in TRAINING)


_train_plan_GPU = TrainEntry(
    "paligemma-3b-pt-224",
    KINDS,
    (TRAIN_PLAN_BF16,),
    _cases(32, Effort(4, 12, 8.0)),
    repeats=2,
    share=150.0,
)
TRAIN_SIZES: dict[str, list[TrainEntry]] = {
    "tiny": [
        TrainEntry(
            "tiny", KINDS, (TRAIN_PLAN_F32,), _cases(2, Effort(2, 2, 0)), repeats=1, small=True
        ),
    ],
    # Few rows: a step of so many weights takes a CPU seconds.
    "cpu": [TrainEntry("mid", KINDS, (TRAIN_PLAN_F32,), _cases(2, Effort(2, 2)))],
    "gpu": [_train_plan_GPU, dataclasses.replace(_train_plan_GPU, model="paligemma2-3b-pt-224")],
}
# What a run of everything else has time for, at its end.
BESIDE_ANSWERING: dict[str, list[TrainEntry]] = {
    "gpu": [dataclasses.replace(_train_plan_GPU, repeats=1)],
}


Progress = Callable[[str, int, int], None]  # what is going on, cases done, cases in all
AnyComparison = Comparison | LossComparison
Found = Callable[[list[Record], list[AnyComparison]], object]
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
        from paligemma_jax.benchmark.huggingface import write_checkpoint

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
