"""A directory that one process at a time may use."""

import os
from pathlib import Path

from paligemma_jax.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: a second process is not noticed
    fcntl = None


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
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(self._descriptor)
            raise CheckpointError(
                f"Another run is writing into {directory}. One at a time fits. Wait for it, or "
                "choose another directory: --workdir DIR"
            ) from e
        except OSError:
            pass  # file systems without locks

    def release(self) -> None:
        """Lets another process have the directory."""
        os.close(self._descriptor)
