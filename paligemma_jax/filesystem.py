"""Files and directories that exist whole or not at all, locks, and the user's cache directory."""

import contextlib
import json
import os
import shlex
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

_INTERVAL = 0.1  # seconds between looks at a lock


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
        free = shutil.disk_usage(target.parent).free
        if nbytes > free:
            raise CheckpointError(
                f"{target} needs {_size(nbytes)}, but {target.parent} has {_size(free)} free. "
                "Choose another target, or make room."
            )
        if staging.exists():
            lock = _lock_staging(staging)  # only a dead process has let go of it
            _remove(staging)
            os.close(lock)
        if is_file:
            staging.touch(exist_ok=False)
        else:
            staging.mkdir()
        lock = _lock_staging(staging)
    except OSError as e:
        raise CheckpointError(
            f"Nothing can be written into {target.parent}: {e.strerror or e}. "
            "Choose another target."
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
                f"Writing {target} failed: {e.strerror or e}. Nothing of it was left behind. It "
                f"needs {_size(nbytes)}: choose another target, or make room."
            ) from e
        raise
    finally:
        os.close(lock)


def staging_path(target: Path) -> Path:
    """Where the unfinished `target` is written."""
    return target.with_name(f".{target.name}.unfinished")


def refuse_existing(target: Path) -> None:
    """Raises CheckpointError where there is anything already."""
    if os.path.lexists(target):
        raise CheckpointError(
            f"{shlex.quote(str(target))} exists already, and is never overwritten. Choose another "
            "target."
        )


def sync_tree(directory: Path) -> None:
    """Makes sure that a file, or every one under a directory, outlives a power failure."""
    if directory.is_file():
        _sync(directory)
    for root, _, files in os.walk(directory):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # directories of some network file systems cannot be
            raise
    finally:
        os.close(descriptor)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes > 1e9 else f"{nbytes / 1e6:.1f} MB"


def _remove(staging: Path) -> None:
    if staging.is_file():
        staging.unlink()
    else:
        shutil.rmtree(staging, ignore_errors=True)


def _lock_staging(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    if not take_lock(descriptor):
        os.close(descriptor)
        raise CheckpointError(
            f"Another process is writing {path}. Wait for it, or choose another target."
        )
    return descriptor


def take_lock(descriptor: int) -> bool:
    """Locks an open file against other processes until it is closed; False if one holds it.

    The system lets go of a lock when its holder dies. True without a lock where the system, or this
    file system, has none.
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


class DirectoryLock:
    """A directory that one process at a time may use, until `release` or the process's end.

    Makes the directory where there is none. Raises CheckpointError where another process holds it,
    or nothing can be written there.
    """

    def __init__(self, directory: Path):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise CheckpointError(
                f"Nothing can be written into {directory}: {e.strerror or e}. Choose another "
                "directory: --workdir DIR"
            ) from e
        if not take_lock(self._descriptor):
            os.close(self._descriptor)
            raise CheckpointError(
                f"Another run is writing into {directory}. Wait for it, or choose another "
                "directory: --workdir DIR"
            )

    def release(self) -> None:
        """Lets another process have the directory."""
        os.close(self._descriptor)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock file at `path`; `waiting` is called once if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not take_lock(descriptor):
            waiting()
            while not take_lock(descriptor):
                time.sleep(_INTERVAL)
        yield
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
    except (OSError, ValueError, RecursionError) as e:
        cannot = (
            f"cannot be read: {e.strerror or e}" if isinstance(e, OSError) else f"is no JSON: {e}"
        )
        raise CheckpointError(
            f"{path} {cannot}. Download the {path.name} published with the weights into the same "
            "directory."
        ) from e
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds a {type(values).__name__}, expected a JSON object. Download it again."
        )
    return values
