"""Checkpoints of a run: a kill, a full disk or a flipped bit costs the last one at most.

DIRECTORY/step_000000100/   one checkpoint: renamed to this when all of it is on the disk
    arrays/, arrays.json    the pytree
    position/0, 1, ...      where each process was in its data
    run.json                whatever else the run remembers, and its metrics
    MANIFEST.json           sha256 of every file

One pytree of arrays on disk, by orbax: written in the background, read onto any devices.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.filesystem import DirectoryLock, staged, staging_path
from paligemma_jax.models.paligemma import nest
from paligemma_jax.training.distributed import agree, barrier, is_first
from paligemma_jax.weights.store import Manifest, as_os_error, checksum_files, quiet

_SPECS = "arrays.json"  # orbax would cast any stored dtype to any wanted one in silence
_ARRAYS = "arrays"
_LISTED = 8  # differences that an error spells out


def begin_writing(directory: Path, tree: Any) -> Callable[[], None]:
    """Starts to write `tree` into a directory that exists; call the result to wait for the end.

    The arrays may be donated or changed as soon as this returns. In a run of several processes
    each of them calls this, with a directory that all of them see. OSError where writing fails.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    leaves = _named_leaves(tree)
    if jax.process_index() == 0:
        specs = {name: _spec(leaf) for name, leaf in leaves.items()}
        (directory / _SPECS).write_text(json.dumps(specs, indent=1) + "\n")
    # On CPUs orbax would read the very memory that the next step may write into.
    copies = {name: _copy_on_cpu(leaf) for name, leaf in leaves.items()}
    with quiet(), as_os_error():
        response = ocp.save_async(str(directory.absolute() / _ARRAYS), nest(copies))

    def wait() -> None:
        with quiet(), as_os_error():
            response.result()

    return wait


def read(directory: Path, like: Any) -> Any:
    """The tree as written, in the structure of `like`, whose leaves say shape, dtype and sharding.

    Leaves of `like` are arrays or `jax.ShapeDtypeStruct`s. Raises CheckpointError where they are
    not those that were written, and OSError where they cannot be read.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    wanted = _named_leaves(like)
    try:
        stored: Mapping[str, Any] = json.loads((directory / _SPECS).read_bytes())
    except ValueError as e:
        raise OSError(f"{_SPECS} is no JSON") from e
    _require_equal(directory, stored, {name: _spec(leaf) for name, leaf in wanted.items()})
    abstract = {name: _placed(leaf) for name, leaf in wanted.items()}
    with quiet(), as_os_error():
        loaded = ocp.load(str(directory.absolute() / _ARRAYS), nest(abstract))
    found = _named_leaves(loaded)
    leaves = [found[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as "opt_state/0/mu/llm/final_norm/scale"."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    dotted = [name for name in named if "." in name]
    if dotted or len(named) < len(pairs):  # orbax would write one array for two such names
        what = f"{dotted[0]!r} has a dot" if dotted else "two of its paths are equal"
        raise CheckpointError(
            f"The tree cannot be saved: {what}. Paths without dots, each once, fit. Rename the key."
        )
    return named


def _copy_on_cpu(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or next(iter(leaf.devices())).platform != "cpu":
        return leaf
    parts = [jax.device_put(np.array(part.data), part.device) for part in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _spec(leaf: Any) -> dict[str, Any]:
    return {"dtype": np.dtype(leaf.dtype).name, "shape": list(leaf.shape)}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_equal(directory: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = [f"{name} is not in the checkpoint" for name in wanted if name not in stored]
    problems += [f"{name} is only in the checkpoint" for name in stored if name not in wanted]
    problems += [
        f"{name} is {_say(stored[name])}, not {_say(spec)}"
        for name, spec in wanted.items()
        if name in stored and stored[name] != spec
    ]
    if problems:
        more = len(problems) - _LISTED
        listing = "\n  ".join(problems[:_LISTED]) + (f"\n  and {more} more" if more > 0 else "")
        raise CheckpointError(
            f"{directory} was written by another model, optimizer or choice of trained "
            f"parameters ({len(problems)} differences):\n  {listing}\n"
            "The configuration that wrote it fits. Go on with that one, or choose a new workdir: "
            "--workdir DIR"
        )


def _say(spec: Mapping[str, Any]) -> str:
    return f"{spec['dtype']}{spec['shape']}"


_NAME = re.compile(r"step_(\d{9,})")
_POSITION, _RUN = "position", "run.json"
_LEFT_OVER = re.compile(r"\.step_\d+\.(unfinished|deleted)")


@dataclasses.dataclass(frozen=True)
class Best:
    """Which checkpoint is the best: that with the lowest, or the highest, value of a metric."""

    metric: str
    highest: bool = False

    def value(self, metrics: Mapping[str, float]) -> float:
        """The metric, turned so that more is better; minus infinity where it was not measured."""
        value = metrics.get(self.metric)
        if value is None or value != value:  # NaN
            return float("-inf")
        return value if self.highest else -value


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint as it was saved; `position` is this process's place in the data.

    A process that did not exist when the checkpoint was written has that of the first one.
    """

    step: int
    tree: Any
    position: bytes
    info: Mapping[str, Any]
    metrics: Mapping[str, float]


class Checkpoints:
    """The checkpoints of one run; one process, or one group of processes, at a time.

    Keeps the newest `keep` and, with `best`, the best one. Raises CheckpointError where another
    run holds the directory, or it cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2, best: Best | None = None):
        if keep < 1:
            raise ConfigError(
                f"Keeping {keep} checkpoints leaves nothing to go on from. 1 or more fits. "
                "Say for example: --config.checkpoints.keep=2"
            )
        self.directory = Path(directory).expanduser().absolute()
        self._keep, self._best = keep, best
        self._writing: concurrent.futures.Future[None] | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._lock = None
        if is_first():
            self._lock = DirectoryLock(self.directory)
            for path in self.directory.iterdir():
                if _LEFT_OVER.fullmatch(path.name):  # its writer is dead: we hold the lock
                    shutil.rmtree(path, ignore_errors=True)
        barrier("the checkpoints' lock")

    def steps(self) -> list[int]:
        """Steps with a checkpoint, the oldest first; whether they are whole is not looked at."""
        names = [path.name for path in self.directory.iterdir()]
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def best_step(self) -> int | None:
        """The step of the best checkpoint; None without `best`, or before anything was measured."""
        if self._best is None:
            return None
        return json.loads(agree("the best checkpoint", json.dumps(self._find_best())))

    def _find_best(self) -> int | None:
        if self._best is None:
            return None
        values = {step: self._best.value(self._metrics(step)) for step in self.steps()}
        measured = {step: value for step, value in values.items() if value > float("-inf")}
        return max(measured, key=lambda step: (measured[step], step)) if measured else None

    def save(
        self,
        step: int,
        tree: Any,
        *,
        position: bytes = b"",
        info: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to save, and returns when the arrays may be donated or changed.

        Waits for the save before it. `position` is this process's place in the data; `info` and
        `metrics` must fit JSON. Raises CheckpointError, also for the save before.
        """
        self.wait()
        target = self.path(step)
        if step in self._agreed_steps():
            return  # a run that goes on from here would write the same
        exits = contextlib.ExitStack()
        try:
            if is_first():
                nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
                directory = exits.enter_context(staged(target, nbytes))
                (directory / _POSITION).mkdir()
                values = {"info": dict(info or {}), "metrics": dict(metrics or {})}
                (directory / _RUN).write_text(json.dumps(values, indent=1) + "\n")
            barrier("the directory of a new checkpoint")
            directory = staging_path(target)
            (directory / _POSITION / str(jax.process_index())).write_bytes(position)
            written = begin_writing(directory, tree)
        except BaseException as e:
            exits.__exit__(type(e), e, e.__traceback__)
            raise

        def finish() -> None:
            with exits:  # renames the directory at its end
                written()
                if is_first():
                    Manifest(checksum_files(directory), {}).write(directory)
            if is_first():
                self._delete_superfluous()

        self._writing = self._pool.submit(finish)

    def check(self) -> None:
        """Raises the CheckpointError of a save that has failed meanwhile."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is on the disk; raises CheckpointError where it is not."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except OSError as e:
                raise CheckpointError(
                    f"A checkpoint could not be written into {self.directory}: {e.strerror or e}. "
                    "The ones before it are whole. Make room, then run the same command again."
                ) from e

    def restore_latest(self, like: Any) -> Restored | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Damaged ones are set aside with a warning. `like` says structure, shapes, dtypes and
        shardings (arrays or `jax.ShapeDtypeStruct`s), which may be others than when it was saved.
        Raises CheckpointError where all are damaged, or where the newest whole one does not fit.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self._agreed_steps()):
            found = self._find_problem(step) if is_first() else ""
            problem = agree("what is wrong with a checkpoint", found)
            if not problem:
                try:
                    restored = self.restore(step, like)
                except OSError as e:
                    if jax.process_count() > 1:  # the others may have read it
                        raise _unreadable(self.path(step), e) from e
                    problem = f"it cannot be read: {e.strerror or e}"
                else:
                    self._set_aside(damaged, step)
                    return restored
            damaged[step] = problem
        if damaged:
            listing = "\n  ".join(f"step {step}: {text}" for step, text in damaged.items())
            raise CheckpointError(
                f"Every checkpoint in {self.directory} is damaged:\n  {listing}\nA copy from "
                "elsewhere fits. Put one there, or begin again in a new workdir: --workdir DIR"
            )
        return None

    def restore(self, step: int, like: Any) -> Restored:
        """The checkpoint of one step, without checking digests; see `restore_latest`."""
        directory = self.path(step)
        tree = read(directory, like)
        positions = directory / _POSITION
        mine = positions / str(jax.process_index())
        values = json.loads((directory / _RUN).read_bytes())
        return Restored(
            step,
            tree,
            (mine if mine.exists() else positions / "0").read_bytes(),
            values["info"],
            values["metrics"],
        )

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.directory / f"step_{step:09d}"

    def close(self) -> None:
        """Waits for what is being written, and lets another run have the directory."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find_problem(self, step: int) -> str:
        """What is wrong with a checkpoint's files; "" for nothing."""
        directory = self.path(step)
        try:
            manifest = Manifest.read(directory)
            problems = manifest.missing_files(directory) or manifest.changed_files(directory)
        except CheckpointError:
            return "MANIFEST.json is missing or damaged"
        except OSError as e:
            return f"it cannot be read: {e.strerror or e}"
        return "; ".join(problems)

    def _set_aside(self, damaged: Mapping[int, str], step: int) -> None:
        for bad, problem in damaged.items():
            aside = self.directory / f"damaged_{self.path(bad).name}"
            warnings.warn(
                f"The checkpoint of step {bad} is damaged ({problem}). The one of step {step} is "
                f"used; the damaged one is kept as {aside}",
                stacklevel=3,
            )
            if is_first():
                shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
                os.rename(self.path(bad), aside)
        barrier("damaged checkpoints set aside")

    def _agreed_steps(self) -> list[int]:
        """As the first process sees them: file systems may show others an older state."""
        return json.loads(agree("the checkpoints", json.dumps(self.steps())))

    def _metrics(self, step: int) -> Mapping[str, float]:
        try:
            return json.loads((self.path(step) / _RUN).read_bytes())["metrics"]
        except (OSError, ValueError, KeyError):
            return {}

    def _delete_superfluous(self) -> None:
        kept = {*self.steps()[-self._keep :], self._find_best()}
        for step in self.steps():
            if step not in kept:
                # Renamed first: one half deleted must not be taken for a checkpoint.
                doomed = self.directory / f".{self.path(step).name}.deleted"
                os.rename(self.path(step), doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} is whole, but process {jax.process_index()} of {jax.process_count()} cannot read "
        f"it: {error.strerror or error}. A directory that all processes share fits. Mount it "
        "where this one runs, or choose another one: --workdir DIR"
    )
