"""Memory that JAX holds: on the device where there is one, else what is resident."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from paligemma_jax.benchmark.resident import forget_most_resident, most_resident


def peak_bytes() -> int:
    """Most that was held so far."""
    stats = _device_stats()
    return stats["peak_bytes_in_use"] if stats else most_resident()


def held_bytes() -> int:
    """What is held now."""
    stats = _device_stats()
    return stats["bytes_in_use"] if stats else _resident_now()


def forget_peak() -> None:
    """Makes `peak_bytes` begin anew, where memory is the machine's; devices forget nothing."""
    if not _device_stats():
        forget_most_resident()


def peak_during(call: Callable[[], object]) -> int | None:
    """Most that is held during a call, what lives before it included; None where none can tell."""
    if stats := _device_stats():
        return _device_peak(call, stats)
    if not forget_most_resident():
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
