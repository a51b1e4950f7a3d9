"""A directory that one process at a time may use."""

import os
from pathlib import Path

from paligemma_jax.errors import CheckpointError
from paligemma_jax.file_lock import take_lock


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
