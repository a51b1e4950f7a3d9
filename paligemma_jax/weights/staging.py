"""Writing a directory, or a file, so that it exists whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from paligemma_jax.errors import CheckpointError
from paligemma_jax.file_lock import take_lock


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
