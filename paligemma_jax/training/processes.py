"""What the processes of one run tell each other; nothing happens in a run of one process."""

import jax
import numpy as np


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(text: str) -> str:
    """The first process's text (at most 1,000 bytes of it), in every process."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    buffer = np.zeros(1000, np.uint8)
    data = np.frombuffer(text.encode()[:1000], np.uint8)
    buffer[: data.size] = data
    told = np.asarray(multihost_utils.broadcast_one_to_all(buffer))
    return told.tobytes().rstrip(b"\0").decode(errors="replace")


def stop_agreed(asked: bool, step: int) -> bool:
    """Whether to stop before the next step: the same in every process, and without waiting.

    In a run of several processes JAX's own service listens for SIGTERM, and `asked` is not looked
    at.
    """
    if jax.process_count() == 1:
        return asked
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
