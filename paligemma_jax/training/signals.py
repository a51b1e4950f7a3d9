"""SIGTERM and Ctrl-C: the step is finished, the run saved, and then it ends."""

import signal
import threading
from types import FrameType
from typing import Any

import jax

_ASKED = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Set by the first SIGTERM or SIGINT inside the block; a second one acts as without it.

    Does nothing outside the main thread, where Python delivers no signals. In a run of several
    processes, which must stop at the same step, SIGTERM is left to JAX, which tells all of them,
    and SIGINT is handed on to it as SIGTERM.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _ASKED if jax.process_count() == 1 else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self.__exit__()
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
