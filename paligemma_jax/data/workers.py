"""Processes that read data: they end with the trainer, and leave accelerators alone."""

import ctypes
import os
import signal
import sys

_SET_PDEATHSIG = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def start_worker(index: int, count: int) -> None:
    """Runs first in each process that reads data."""
    # Whoever imports jax here must not take the accelerator's memory.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Ctrl-C goes to all processes of a terminal; the trainer decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # Otherwise a killed trainer would leave its workers behind for ever.
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PDEATHSIG, signal.SIGKILL)


def parse_absl_flags() -> None:
    """grain asks absl for its flags, which nobody has parsed in a program that uses none."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
