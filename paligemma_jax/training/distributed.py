"""Runs on several devices and processes: placement of state and batches, agreement, failures.

Processes talk through the service that `jax.distributed.initialize` starts, so that no device
waits, and every wait ends. An error in one of them ends all: the others would wait for ever, maybe
inside a computation, where no exception reaches them. With one process all of that does nothing.

Batches are split over the mesh axes "data" and "fsdp"; gradients, moments and averages lie as the
weights they belong to (`models.sharding`).
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
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paligemma_jax.errors import ConfigError, PaliGemmaError
from paligemma_jax.models.sharding import (
    DATA,
    FSDP,
    AnyMesh,
    leaf_sharding,
    shardings,
)
from paligemma_jax.training.step import TrainState

_TIMEOUT = 3600  # seconds; the longest wait is for the first process to checksum all files
_INTERVAL = 0.5  # seconds between two looks at what others say
_GOODBYE = 5.0  # seconds that others have for saying that they have heard
_FAILED = 1  # exit code
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat")  # in messages of computations
_uses: collections.Counter[str] = collections.Counter()  # the same in every process


class ProcessesError(PaliGemmaError):
    """Another process of this run has stopped, or cannot be reached."""


def state_shardings(state: TrainState, mesh: AnyMesh) -> TrainState:
    """A `TrainState` of shardings for a state of arrays or shapes; moments lie as their weights."""

    def of(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in keys if isinstance(getattr(key, "key", None), str)]
        return leaf_sharding(names[-1] if names else "", leaf, mesh)

    found = jax.tree_util.tree_map_with_path(of, dataclasses.replace(state, frozen=None))
    return dataclasses.replace(found, frozen=shardings(state.frozen, mesh))


def place(array: Any, sharding: Any) -> jax.Array:
    """An array that is the same in every process, on the devices of `sharding`."""
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(array)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Examples over "data" and "fsdp", everything else whole."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's examples as its part of one batch of all processes, on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def process_shard(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """The number of this process's part of every batch, from 0 up, and how many parts there are.

    Processes whose devices only split tensors have the same part. Raises ConfigError where a batch
    cannot be divided evenly over the devices, or the examples of a process are no such part.
    """
    ways = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch_size % ways:
        raise ConfigError(
            f"expected a batch_size that is a multiple of {ways} devices, got {batch_size}. "
            f"Write --config.batch_size={max(ways, batch_size // ways * ways)}"
        )
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = {examples[0].indices(batch_size)[:2] for examples in places if examples}
    first, last = min(low for low, _ in spans), max(high for _, high in spans)
    size = last - first
    if sum(high - low for low, high in spans) != size or batch_size % size or first % size:
        raise ConfigError(
            f"On this mesh process {jax.process_index()} of {jax.process_count()} would read the "
            f"examples {sorted(spans)} of {batch_size}, which are no even part. Choose data * fsdp "
            "as a multiple or a divisor of the processes: --config.mesh='Axes(fsdp=-1)'"
        )
    return first // size, batch_size // size


def is_first() -> bool:
    """Whether this is the process that writes what only one can write."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Returns when every process has come here; ProcessesError where one does not."""
    if jax.process_count() > 1:
        with _explained(f"waiting until each process is past {what!r}"):
            _service().wait_at_barrier(_new_key(what), _TIMEOUT * 1000)


def agree(what: str, text: str) -> str:
    """The first process's text, in every process; ProcessesError where it does not come."""
    if jax.process_count() == 1:
        return text
    key = _new_key(what)
    if is_first():
        _service().key_value_set(key, text)
        return text
    with _explained(f"waiting for the first process's {what!r}"):
        return _service().blocking_key_value_get(key, _TIMEOUT * 1000)


def stop_agreed(asked: bool, step: int) -> bool:
    """Whether to stop before the next step: the same in every process, and without waiting.

    With several processes JAX's own service listens for SIGTERM, and `asked` is not looked at.
    """
    if jax.process_count() == 1:
        return asked
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def _new_key(what: str) -> str:
    """A key that this run has not used yet, the same in every process."""
    _uses[what] += 1
    return f"paligemma_jax/{what}/{_uses[what]}"


def _service() -> Any:
    """JAX's connection to the service of this run; it has no public name, and orbax asks so too."""
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise ConfigError(
            f"There are {jax.process_count()} processes, and no service through which they could "
            "agree. Call first: jax.distributed.initialize()"
        )
    return client


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        raise ProcessesError(
            f"Process {jax.process_index()} of {jax.process_count()} gave up {what} (at most "
            f"{_TIMEOUT:,} s): {str(e).splitlines()[0]}. See what the other processes say, then "
            "start all of them again; they continue from the last checkpoint."
        ) from e


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """An error that leaves the block is told to the other processes, and they end with it.

    Those are ended where they are: they say why on standard error, and exit with code 1. The error
    itself is raised in the process where it happened.
    """
    if jax.process_count() == 1:
        yield
        return
    service, key, me = _service(), _new_key("failure"), jax.process_index()
    over = threading.Event()

    def hear() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            service.key_value_set(f"{key}/{me}", "heard")

    def watch() -> None:
        while not over.wait(_INTERVAL):
            try:
                number, text = json.loads(service.key_value_try_get(key))
            except jax.errors.JaxRuntimeError:
                continue  # nothing was told; without its service JAX ends the process
            if not over.is_set():
                hear()
                _end(f"process {number} stopped: {text}")

    def tell(error: BaseException) -> None:
        kind = "" if isinstance(error, PaliGemmaError) else f"{type(error).__name__}: "
        text = f"{kind}{str(error) or type(error).__name__}"
        try:
            service.key_value_set(key, json.dumps([me, text]))
        except jax.errors.JaxRuntimeError:  # another one was faster
            return hear()
        until = time.monotonic() + _GOODBYE
        for other in set(range(jax.process_count())) - {me}:  # until they have heard
            left = max(1, int((until - time.monotonic()) * 1000))
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # it may be gone already
                service.blocking_key_value_get(f"{key}/{other}", left)

    watcher = threading.Thread(target=watch, name="failures of others", daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as e:
        over.set()
        watcher.join()
        # Whoever ends is missing when JAX says goodbye, and would be waited for until a time limit.
        atexit.register(_exit)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            tell(e)
        raise
    finally:
        over.set()
        watcher.join()


@contextlib.contextmanager
def ending_with_the_lost() -> Iterator[None]:
    """Ends this process where a computation in the block fails because another one was killed.

    Nothing around the block is closed: what is being saved would wait for the lost process. Where
    this one computes nothing but waits, JAX itself ends it after 100 seconds.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if jax.process_count() > 1 and any(word in str(e) for word in _LOST):
            time.sleep(3 * _INTERVAL)  # if that process has told why, this one ends meanwhile
            _end(
                "another process of this run has ended, or cannot be reached: "
                f"{str(e).splitlines()[0]}. Start all of them again; they continue from the last "
                "checkpoint."
            )
        raise


def _end(why: str) -> None:
    me = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"paligemma: {me} ends, since {why}", file=sys.stderr)
    _exit()


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_FAILED)
