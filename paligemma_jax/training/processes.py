"""What the processes of one run tell each other; nothing happens in a run of one process.

They talk through the service that `jax.distributed.initialize` starts, so that no device waits,
and every wait ends: by a time limit, or because the service misses a process.
"""

import collections
import contextlib
from typing import Any

import jax

from paligemma_jax.errors import ConfigError, PaliGemmaError

_PATIENCE = 3600  # seconds; what others wait for longest is the first one's reading of all files
_uses: collections.Counter[str] = collections.Counter()  # the same in every process


class ProcessesError(PaliGemmaError):
    """Another process of this run has stopped, or cannot be reached."""


def is_first() -> bool:
    """Whether this is the process that writes what only one can write."""
    return jax.process_index() == 0


def barrier(what: str, seconds: int = _PATIENCE) -> None:
    """Returns when every process has come here; ProcessesError where one does not in `seconds`."""
    if jax.process_count() == 1:
        return
    key = new_key(what)
    with _told(f"waiting until each process is past {what!r}", seconds):
        service().wait_at_barrier(key, seconds * 1000)


def agree(what: str, text: str, seconds: int = _PATIENCE) -> str:
    """The first process's text, in every process; ProcessesError where it does not come."""
    if jax.process_count() == 1:
        return text
    key = new_key(what)
    if is_first():
        service().key_value_set(key, text)
        return text
    with _told(f"waiting for what the first process says of {what!r}", seconds):
        return service().blocking_key_value_get(key, seconds * 1000)


def stop_agreed(asked: bool, step: int) -> bool:
    """Whether to stop before the next step: the same in every process, and without waiting.

    In a run of several processes JAX's own service listens for SIGTERM, and `asked` is not looked
    at.
    """
    if jax.process_count() == 1:
        return asked
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def new_key(what: str) -> str:
    """A key that this run has not used yet, the same in every process."""
    _uses[what] += 1
    return f"paligemma_jax/{what}/{_uses[what]}"


def service() -> Any:
    """JAX's connection to the service of this run, which has no public name; orbax asks so too.

    Raises ConfigError without one.
    """
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise ConfigError(
            f"There are {jax.process_count()} processes, and nothing through which they could "
            "agree. JAX's service fits. Call first: jax.distributed.initialize()"
        )
    return client


@contextlib.contextmanager
def _told(what: str, seconds: int) -> Any:
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        first = str(e).splitlines()[0]
        raise ProcessesError(
            f"Process {jax.process_index()} of {jax.process_count()} gave up {what} (at most "
            f"{seconds:,} s): {first}. All processes of a run must be alive, and at the same "
            "place. See what the others say, then start all of them again; they go on from the "
            "last checkpoint."
        ) from e
