"""Processes that read data: they end with the trainer, and leave accelerators alone."""

import os
import signal
import sys
import threading
import time

_INTERVAL = 1.0  # seconds


def start_worker(index: int, count: int) -> None:
    """Runs first in each process that reads data."""
    # Whoever uses jax here must not take the accelerator's memory. If it is imported already, as by
    # what is read here, it no longer looks at the environment.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # Ctrl-C goes to all processes of a terminal; the trainer decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Otherwise a killed trainer would leave its workers behind for ever.
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process once `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(_INTERVAL)
    os._exit(1)


def parse_absl_flags() -> None:
    """grain asks absl for its flags, which nobody has parsed in a program that uses none."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
