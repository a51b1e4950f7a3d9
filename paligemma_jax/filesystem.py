"""Writing a directory, or a file, so that it exists whole or not at all.

The lock of a file, which the system lets go of when its holder dies.

Where this library keeps for a user what it can make or download again.

JSON objects from files that may be missing or damaged.

A directory that one process at a time may use.

One download of the same files at a time, over all processes of a machine.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paligemma_jax.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: other processes are not noticed
    fcntl = None


def take_lock(descriptor: int) -> bool:
    """Locks an open file against other processes until it is closed; False if one holds it.

    True without a lock where the system, or this file system, has none.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def staged(target: Path, nbytes: int, *, is_file: bool = False) -> Iterator[Path]:
    """Yields a new directory or file beside `target`, renamed to `target` after the block.

    An error in the block, or the end of the process, leaves no `target`. What an earlier process
    left behind is removed; one that is still writing is not disturbed. `nbytes` is about what the
    block writes. Raises CheckpointError where nothing can be written.
    """
    target = target.absolute()
    refuse_existing(target)
    staging = staging_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_space(target, nbytes)
        _remove_leftover(staging)
        if is_file:
            staging.touch(exist_ok=False)
        else:
            staging.mkdir()
        lock = _lock(staging)
    except OSError as e:
        raise CheckpointError(
            f"Nothing can be written into {target.parent}: {e.strerror or e}. A directory you may "
            "write to, with enough space, fits. Choose another target."
        ) from e
    try:
        yield staging
        sync_tree(staging)
        refuse_existing(target)
        os.rename(staging, target)
        _sync(target.parent)
    except BaseException as e:
        _remove(staging)
        if isinstance(e, OSError):
            raise CheckpointError(
                f"Writing {target} failed: {e.strerror or e}. Nothing of it was left behind. A "
                f"disk with {_spell(nbytes)} free fits. Choose another target, or make room."
            ) from e
        raise
    finally:
        os.close(lock)


def staging_path(target: Path) -> Path:
    """Where the unfinished `target` is written."""
    return target.with_name(f".{target.name}.unfinished")


def sync_tree(directory: Path) -> None:
    """Makes sure that a file, or every one under a directory, outlives a power failure."""
    if directory.is_file():
        _sync(directory)
    for root, _, files in os.walk(directory):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def refuse_existing(target: Path) -> None:
    """Raises CheckpointError where there is anything already."""
    if os.path.lexists(target):
        raise CheckpointError(
            f"{target} exists already, and nothing is ever overwritten. A new path fits. "
            f"Choose another target, or remove it first: rm -r {target}"
        )


def _require_space(target: Path, nbytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if nbytes > free:
        raise CheckpointError(
            f"{target} needs {_spell(nbytes)}, but {target.parent} has {_spell(free)} free. A disk "
            "with more space fits. Choose another target, or make room."
        )


def _spell(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes > 1e9 else f"{nbytes / 1e6:.1f} MB"


def _remove_leftover(staging: Path) -> None:
    if staging.exists():
        lock = _lock(staging)  # only a dead process has let go of it
        _remove(staging)
        os.close(lock)


def _remove(staging: Path) -> None:
    if staging.is_file():
        staging.unlink()
    else:
        shutil.rmtree(staging, ignore_errors=True)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    if not take_lock(descriptor):
        os.close(descriptor)
        raise CheckpointError(
            f"Another process is writing {path}. One at a time fits. Wait for it, or choose "
            "another target."
        )
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # directories of some network file systems cannot be synchronised
    finally:
        os.close(descriptor)


def user_cache() -> Path:
    """Directory of this library in the user's cache; it need not exist."""
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        root = home / "Library" / "Caches"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return root / "paligemma-jax"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is missing or something else."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as e:
        raise CheckpointError(
            f"{path} cannot be read: {e.strerror or e}. The {path.name} published with the weights "
            "fits. Download it into the same directory."
        ) from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{path} is no JSON: {e}. The {path.name} published with the weights fits. Download it "
            "again."
        ) from e
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds a {type(values).__name__}. A JSON object fits. Download it again."
        )
    return values


class DirectoryLock:
    """Held until `release`, or until the process ends, however it ends.

    Makes the directory where there is none. Raises CheckpointError where another process holds it,
    or nothing can be written there.
    """

    def __init__(self, directory: Path):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise CheckpointError(
                f"Nothing can be written into {directory}: {e.strerror or e}. A directory you may "
                "write to fits. Choose another one: --workdir DIR"
            ) from e
        if not take_lock(self._descriptor):
            os.close(self._descriptor)
            raise CheckpointError(
                f"Another run is writing into {directory}. One at a time fits. Wait for it, or "
                "choose another directory: --workdir DIR"
            )

    def release(self) -> None:
        """Lets another process have the directory."""
        os.close(self._descriptor)


_INTERVAL = 0.1  # seconds between looks


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock file at `path`; `waiting` is called once if another process has it.

    The lock of a process that died is free. Where there are no locks, the second process downloads
    too, and what it gets is the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        told = False
        while not take_lock(descriptor):
            if not told:
                waiting()
                told = True
            time.sleep(_INTERVAL)
        yield
    finally:
        os.close(descriptor)
