"""What the processes of one run tell each other; nothing happens in a run of one process.

They talk through the service that `jax.distributed.initialize` starts, so that no device waits,
and every wait ends: by a time limit, or because the service misses a process.

An error in one of several processes ends them all; otherwise the others would wait for ever.

They may be waiting in the middle of a computation, where no exception reaches them.

Where a run lies on many devices: its weights by `models.sharding`, everything like them too.

Rows of a batch are split over the axes "data" and "fsdp". Gradients, moments and averages lie as
the weights they belong to.
"""

import atexit
import collections
import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paligemma_jax.errors import ConfigError, PaliGemmaError
from paligemma_jax.models.sharding import (
    DATA,
    FSDP,
    RULES,
    AnyMesh,
    Layouts,
    Rules,
    leaf_sharding,
    shardings,
)
from paligemma_jax.processing.processor import Batch
from paligemma_jax.training.step import TrainState

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


_EVERY = 0.5  # seconds between two looks
_GOODBYE = 5.0  # seconds that others have for saying that they have heard
_FAILED = 1  # exit code
_LOSSES = ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat")  # in messages of computations


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """An error that leaves the block is told to the other processes, and they end with it.

    Those are ended where they are: they say why on standard error, and exit with code 1. The error
    itself is raised in the process where it happened; it waits for nobody when it exits.
    """
    if jax.process_count() == 1:
        yield
        return
    failure = _Failure(new_key("failure"))
    watch = threading.Thread(target=failure.watch, name="failures of others", daemon=True)
    watch.start()
    try:
        yield
    except BaseException as e:
        failure.over.set()
        watch.join()
        # Whoever ends is missing when JAX says goodbye, and would be waited for until a time limit.
        atexit.register(_leave)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            failure.tell(e)
        raise
    finally:
        failure.over.set()
        watch.join()


@contextlib.contextmanager
def ending_with_the_lost() -> Iterator[None]:
    """Ends this process, with a message, where a computation fails since another one was killed.

    Nothing around the block is closed: what is being saved would wait for the lost one. Where this
    one computes nothing but waits, JAX itself ends it when it misses the other, after 100 seconds.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if jax.process_count() > 1 and any(word in str(e) for word in _LOSSES):
            time.sleep(3 * _EVERY)  # if that process has told why it went, this one ends meanwhile
            _end(
                "another process of this run has ended, or cannot be reached: "
                f"{str(e).splitlines()[0]}. Start all of them again; they go on from the last "
                "checkpoint."
            )
        raise


class _Failure:
    """The first error of a run's processes, known to all through the service."""

    def __init__(self, key: str):
        self.over = threading.Event()
        self._key = key
        self._service = service()

    def watch(self) -> None:
        """Ends this process when another one has told of an error."""
        while not self.over.wait(_EVERY):
            try:
                told = self._told()
            except jax.errors.JaxRuntimeError:
                continue  # without its service JAX ends the process
            if told and not self.over.is_set():
                self._hear()
                _end(told)

    def tell(self, error: BaseException) -> None:
        """Tells the others, unless one of them has told before, and waits until they have heard."""
        me = jax.process_index()
        text = str(error) or type(error).__name__
        kind = "" if isinstance(error, PaliGemmaError) else f"{type(error).__name__}: "
        try:
            self._service.key_value_set(self._key, json.dumps([me, f"{kind}{text}"]))
        except jax.errors.JaxRuntimeError:  # another one was faster
            self._hear()
            return
        until = time.monotonic() + _GOODBYE
        for other in set(range(jax.process_count())) - {me}:
            left = max(1, int((until - time.monotonic()) * 1000))
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # it may be gone already
                self._service.blocking_key_value_get(f"{self._key}/{other}", left)

    def _told(self) -> str:
        try:
            number, text = json.loads(self._service.key_value_try_get(self._key))
        except jax.errors.JaxRuntimeError as e:
            if "NOT_FOUND" in str(e):
                return ""
            raise
        return f"process {number} stopped: {text}"

    def _hear(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._service.key_value_set(f"{self._key}/{jax.process_index()}", "heard")


def _end(why: str) -> None:
    me = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"paligemma: {me} ends, since {why}", file=sys.stderr)
    _leave()


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_FAILED)


def state_shardings(state: TrainState, mesh: AnyMesh, rules: Rules[Layouts] = RULES) -> TrainState:
    """A `TrainState` of shardings for a state of arrays or shapes; moments lie as their weights."""

    def of(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in keys if isinstance(getattr(key, "key", None), str)]
        return leaf_sharding(names[-1] if names else "", leaf, mesh, rules)

    found = jax.tree_util.tree_map_with_path(of, dataclasses.replace(state, frozen=None))
    return dataclasses.replace(found, frozen=shardings(state.frozen, mesh, rules))


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Rows over "data" and "fsdp", everything else whole."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows as its part of one batch of all processes, on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def place_state(state: TrainState, shardings: TrainState) -> TrainState:
    """The state, the same in every process, on the devices."""

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, state, shardings)
