"""What this machine does at best, measured with JAX: memory bandwidth and matrix products.

The naive ways mislead on CPUs: a copy into a fresh array waits for the pages to be made (a sixth of
the speed), and bfloat16 products with bfloat16 results are widened first (half of it). So several
ways are tried in turn, and the best repetition of the best one counts.
"""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from paligemma_jax.models.backend import on_cpu

COLUMNS = 8192  # of the matrix that is read: rows of 32 KiB gave CPUs their best


def measure_ceilings(small: bool = False) -> dict[str, float]:
    """`read`, `copy` (bytes/s; read and written ones), `float32`, `bfloat16` (operations/s).

    `small` is for trying: it measures caches.
    """
    size = (1 << 22) if small else (1 << 30) if on_cpu() else (1 << 32)
    widths = (128,) if small else (2048, 4096) if on_cpu() else (8192,)
    seconds = 0.01 if small else 1.2
    numbers = _bandwidths(size, seconds)
    for name in ("float32", "bfloat16"):
        numbers[name] = max(_rate(jnp.dtype(name), width, seconds / 2) for width in widths)
    return numbers


def _bandwidths(size: int, seconds: float) -> dict[str, float]:
    matrix = jnp.ones((size // 4 // COLUMNS, COLUMNS), jnp.float32)
    vector = jnp.ones(COLUMNS, jnp.float32)
    ways = [jax.jit(jnp.sum), jax.jit(lambda m: m.sum(1)), jax.jit(lambda m: m @ vector)]
    read = size / _best([lambda way=way: way(matrix) for way in ways], seconds)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no fresh pages

    def copy() -> jax.Array:
        nonlocal matrix
        matrix = add(matrix)
        return matrix

    return {"read": read, "copy": 2 * size / _best([copy], seconds)}


def _rate(dtype: jnp.dtype, width: int, seconds: float) -> float:
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    one = jnp.full((width, width), 0.01, dtype)
    return 2 * width**3 / _best([lambda: product(one, one)], seconds)


def _best(calls: Sequence[Callable[[], jax.Array]], seconds: float) -> float:
    """Least seconds of any call, tried in turn for so long."""
    for call in calls:
        jax.block_until_ready(call())
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 * len(calls) or time.perf_counter() < end:
        for call in calls:
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
    return min(times)
