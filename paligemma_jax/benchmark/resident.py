"""Resident memory of this process, without asking any library for its devices."""

import ctypes
import gc
import sys
from pathlib import Path


def most_resident() -> int:
    """Bytes at their highest so far, pages of mapped files that were read included."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):  # ru_maxrss may be the parent process's, here
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def forget_most_resident() -> bool:
    """Makes `most_resident` begin anew; returns False where the system cannot.

    What was freed goes back to the system first: it is resident, and nobody's.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
