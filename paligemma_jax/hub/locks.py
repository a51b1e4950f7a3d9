"""One download of the same files at a time, over all processes of a machine."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from paligemma_jax.file_lock import take_lock

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
