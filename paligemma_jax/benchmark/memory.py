"""Memory that JAX holds: on the device where there is one, else what is resident."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from paligemma_jax.benchmark.resident import most_resident


def peak_bytes() -> int:
    """Most that was held so far."""
    stats = _device_stats()
    return stats["peak_bytes_in_use"] if stats else most_resident()


def held_bytes() -> int:
    """What is held now."""
    stats = _device_stats()
    return stats["bytes_in_use"] if stats else _resident_now()


def peak_during(call: Callable[[], object]) -> int | None:
    """Most that is held during a call, what lives before it included; None where none can tell."""
    if stats := _device_stats():
        return _device_peak(call, stats)
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    except OSError:
        return None
    call()
    return most_resident()


def _device_peak(call: Callable[[], object], stats: dict[str, int]) -> int:
    """A device never forgets its peak; so memory is filled up to there first."""
    before = stats["bytes_in_use"]
    ballast = jnp.zeros(max(stats["peak_bytes_in_use"] - before, 1), jnp.int8)
    jax.block_until_ready(ballast)
    filled = _device_stats()
    call()
    above = _device_stats()["peak_bytes_in_use"] - filled["bytes_in_use"]
    del ballast
    return before + above


def _return_freed_memory() -> None:
    """To the system, what compiling has freed: it is resident, and nobody's."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library


def _device_stats() -> dict[str, int]:
    """Empty where memory is the machine's."""
    device = jax.local_devices()[0]
    return {} if device.platform == "cpu" else device.memory_stats() or {}


def _resident_now() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return most_resident()
    return pages * 4096
