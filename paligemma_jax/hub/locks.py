"""One download of the same files at a time, over all processes of a machine."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: the second process downloads too, and what it gets is the same
    fcntl = None

_INTERVAL = 0.1  # seconds between looks


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock file at `path`; `waiting` is called once if another process has it.

    The lock of a process that died is free. File systems without locks have none here either.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if fcntl is not None:
            told = False
            while not _take(descriptor):
                if not told:
                    waiting()
                    told = True
                time.sleep(_INTERVAL)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
