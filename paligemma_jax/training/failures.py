"""An error in one of several processes ends them all; otherwise the others would wait for ever.

They may be waiting in the middle of a computation, where no exception reaches them.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator

import jax

from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.training.processes import new_key, service

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
