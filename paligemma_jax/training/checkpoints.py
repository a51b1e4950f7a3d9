"""Checkpoints of a run: a kill, a full disk or a flipped bit costs the last one at most.

DIRECTORY/step_000000100/   one checkpoint: renamed to this when all of it is on the disk
    arrays/, arrays.json    the pytree, by orbax, and its dtypes and shapes
    position/0, 1, ...      where each process was in its data
    run.json                whatever else the run remembers, and its metrics
    MANIFEST.json           sha256 of every file

Orbax's own CheckpointManager is not used: it loads flipped bits as weights, casts stored dtypes
silently, and does not fall back to an earlier checkpoint.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax.errors import CheckpointError, ConfigError, problem_list
from paligemma_jax.filesystem import DirectoryLock, staged, staging_path
from paligemma_jax.models.paligemma import nest
from paligemma_jax.training.distributed import agree, barrier, is_first
from paligemma_jax.weights.store import Manifest, as_os_error, checksum_files, quiet

_NAME = re.compile(r"step_(\d{9,})")
_LEFT_OVER = re.compile(r"\.step_\d+\.(unfinished|deleted)")
_ARRAYS, _SPECS, _POSITION, _RUN = "arrays", "arrays.json", "position", "run.json"


@dataclasses.dataclass(frozen=True)
class Best:
    """Which checkpoint is the best: that with the lowest, or the highest, value of a metric."""

    metric: str
    highest: bool = False


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

    Keeps the newest `max_to_keep` and, with `best`, the best one. Raises CheckpointError where
    another run holds the directory, or it cannot be written.
    """

    def __init__(
        self, directory: str | os.PathLike[str], max_to_keep: int = 2, best: Best | None = None
    ):
        if max_to_keep < 1:
            raise ConfigError(f"expected max_to_keep of at least 1, got {max_to_keep}")
        self.directory = Path(directory).expanduser().absolute()
        self._max_to_keep, self._best = max_to_keep, best
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
        """Steps with a checkpoint, the oldest first, whether intact or not."""
        names = [path.name for path in self.directory.iterdir()]
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def best_step(self) -> int | None:
        """The step of the best checkpoint; None without `best`, or before anything was measured."""
        return json.loads(agree("the best checkpoint", json.dumps(self._find_best())))

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
        if step in self.agreed_steps():
            return  # a run that continues from here would write the same
        exits = contextlib.ExitStack()
        try:
            if is_first():
                nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
                directory = exits.enter_context(staged(target, nbytes))
                (directory / _POSITION).mkdir()
                _write_json(directory / _RUN, info=dict(info or {}), metrics=dict(metrics or {}))
            barrier("the directory of a new checkpoint")
            directory = staging_path(target)
            (directory / _POSITION / str(jax.process_index())).write_bytes(position)
            wait_for_arrays = _begin_writing(directory, tree)
        except BaseException as e:
            exits.__exit__(type(e), e, e.__traceback__)
            raise

        def finish() -> None:
            with exits:  # renames the directory at its end
                wait_for_arrays()
                if is_first():
                    Manifest(checksum_files(directory), {}).write(directory)
            if is_first():
                kept = {*self.steps()[-self._max_to_keep :], self._find_best()}
                self._delete(step for step in self.steps() if step not in kept)

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
                    f"A checkpoint could not be written to {self.directory}: {e.strerror or e}. "
                    "Those before it are intact. Make room, then run the same command again."
                ) from e

    def restore_latest(self, like: Any) -> Restored | None:
        """The newest intact checkpoint; None where there is none at all.

        Damaged ones are set aside with a warning. `like` gives structure, shapes, dtypes and
        shardings (arrays or `jax.ShapeDtypeStruct`s); shardings may differ from those saved.
        Raises CheckpointError where all are damaged, or where the newest intact one does not match.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.agreed_steps()):
            found = self._find_damage(step) if is_first() else ""
            damaged[step] = agree("what is wrong with a checkpoint", found)
            if damaged[step]:
                continue
            try:
                restored = self.restore(step, like)
            except OSError as e:
                damaged[step] = f"it cannot be read: {e.strerror or e}"
                if jax.process_count() > 1:  # the others may have read it
                    raise CheckpointError(
                        f"{self.path(step)} is intact, but process {jax.process_index()} of "
                        f"{jax.process_count()} failed: {damaged[step]}. Choose a directory that "
                        "all processes share: --workdir DIR"
                    ) from e
            else:
                del damaged[step]
                self._set_aside(damaged, step)
                return restored
        if damaged:
            listing = "\n  ".join(f"step {step}: {text}" for step, text in damaged.items())
            raise CheckpointError(
                f"Every checkpoint in {self.directory} is damaged:\n  {listing}\nPut a copy from "
                "elsewhere there, or begin again in a new directory: --workdir DIR"
            )
        return None

    def restore(self, step: int, like: Any) -> Restored:
        """The checkpoint of one step, without verifying checksums; see `restore_latest`."""
        directory = self.path(step)
        tree = _read(directory, like)
        mine = directory / _POSITION / str(jax.process_index())
        position = (mine if mine.exists() else mine.with_name("0")).read_bytes()
        values = json.loads((directory / _RUN).read_bytes())
        return Restored(step, tree, position, values["info"], values["metrics"])

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

    def _find_best(self) -> int | None:
        """The best step, the later of equals; None where the metric was never measured."""
        best = self._best
        if best is None:
            return None
        measured: dict[int, float] = {}
        for step in self.steps():
            with contextlib.suppress(OSError, ValueError, KeyError):
                metrics = json.loads((self.path(step) / _RUN).read_bytes())["metrics"]
                if not math.isnan(value := metrics[best.metric]):
                    measured[step] = value if best.highest else -value
        return max(measured, key=lambda step: (measured[step], step)) if measured else None

    def _find_damage(self, step: int) -> str:
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
            aside = self._unused(f"damaged_{self.path(bad).name}")
            warnings.warn(
                f"The checkpoint of step {bad} is damaged ({problem}). The one of step {step} is "
                f"used; the damaged one is kept as {aside}",
                stacklevel=3,
            )
            if is_first():
                os.rename(self.path(bad), aside)
        barrier("damaged checkpoints set aside")

    def _unused(self, name: str) -> Path:
        """The path of a name, numbered where earlier ones have it already."""
        number, path = 1, self.directory / name
        while os.path.lexists(path):
            number += 1
            path = self.directory / f"{name}_{number}"
        return path

    def agreed_steps(self) -> list[int]:
        """As the first process sees them: file systems may show others an older state."""
        return json.loads(agree("the checkpoints", json.dumps(self.steps())))

    def _delete(self, steps: Iterable[int]) -> None:
        for step in steps:
            # Renamed first: one half deleted must not be taken for a checkpoint.
            doomed = self.directory / f".{self.path(step).name}.deleted"
            os.rename(self.path(step), doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _begin_writing(directory: Path, tree: Any) -> Callable[[], None]:
    """Starts to write `tree` into a directory that exists; call the result to wait for the end.

    The arrays may be donated or changed as soon as this returns. In a run of several processes
    each of them calls this, with a directory that all of them see. OSError where writing fails.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    leaves = _named_leaves(tree)
    if is_first():
        _write_json(directory / _SPECS, **{name: _spec(leaf) for name, leaf in leaves.items()})
    # On CPUs orbax would read the very memory that the next step may write into.
    copies = {name: _copy_on_cpu(leaf) for name, leaf in leaves.items()}
    with quiet(), as_os_error():
        response = ocp.save_async(str(directory / _ARRAYS), nest(copies))

    def wait() -> None:
        with quiet(), as_os_error():
            response.result()

    return wait


def _read(directory: Path, like: Any) -> Any:
    """The tree as written; CheckpointError where it does not match `like`, OSError for damage."""
    import orbax.checkpoint.experimental.v1 as ocp

    wanted = _named_leaves(like)
    try:
        stored: Mapping[str, Any] = json.loads((directory / _SPECS).read_bytes())
    except ValueError as e:
        raise OSError(f"{_SPECS} is not JSON") from e
    _require_equal(directory, stored, {name: _spec(leaf) for name, leaf in wanted.items()})
    abstract = {name: _abstract(leaf) for name, leaf in wanted.items()}
    with quiet(), as_os_error():
        loaded = _named_leaves(ocp.load(str(directory / _ARRAYS), nest(abstract)))
    return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in wanted])


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as "opt_state/0/mu/llm/final_norm/scale"."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    dotted = [name for name in named if "." in name]
    if dotted or len(named) < len(pairs):  # orbax would write one array for two such names
        what = f"{dotted[0]!r} has a dot" if dotted else "two of its paths are equal"
        raise CheckpointError(f"The tree cannot be saved: {what}. Rename the key.")
    return named


def _copy_on_cpu(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or next(iter(leaf.devices())).platform != "cpu":
        return leaf
    parts = [jax.device_put(np.array(part.data), part.device) for part in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _spec(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_equal(directory: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    problems = [
        f"{name} is {stored.get(name, 'missing')} in the checkpoint, {wanted.get(name, 'not')} here"
        for name in {**wanted, **stored}
        if stored.get(name) != wanted.get(name)
    ]
    if problems:
        raise CheckpointError(
            f"{directory} was written by another model, optimizer or choice of trained parameters "
            f"{problem_list(problems)}\n"
            "Continue with the configuration that wrote it, or choose a new directory: "
            "--workdir DIR"
        )


def _write_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
