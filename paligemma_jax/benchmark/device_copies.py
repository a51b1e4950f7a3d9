"""(g) Ways to bring weights to a device: gigabytes a second of each."""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax.benchmark.device_answers import (
    Answer,
    Measured,
    Sizes,
    attempt,
    seconds_per_call,
)

CHUNKS = 16
THREADS = 4


def copies_to_the_device(sizes: Sizes) -> Iterator[Answer]:
    """(g) One array, chunks, chunks by several threads, pinned memory, and a file."""
    device = jax.devices()[0]
    data = np.random.default_rng(0).integers(0, 256, (CHUNKS, sizes.megabytes << 16), np.uint8)

    def put(x: np.ndarray) -> jax.Array:
        return jax.device_put(x, device)

    def by_threads() -> list[jax.Array]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(put, data))

    def pinned() -> Callable[[], Any]:
        here = jax.sharding.SingleDeviceSharding(device)
        staged = jax.device_put(data, here.with_memory_kind("pinned_host"))
        jax.block_until_ready(staged)
        return lambda: jax.device_put(staged, here.with_memory_kind("device"))

    def measure(make: Callable[[], Callable[[], Any]]) -> Measured:
        return data.nbytes / seconds_per_call(make(), calls=1) / 1e9, "GB/s", ""

    ways: list[tuple[str, Callable[[], Callable[[], Any]]]] = [
        (f"{data.nbytes / 2**20:.0f} MiB at once", lambda: lambda: put(data)),
        (f"{CHUNKS} chunks", lambda: lambda: [put(chunk) for chunk in data]),
        (f"{CHUNKS} chunks, {THREADS} threads", lambda: by_threads),
        ("from pinned memory", pinned),
    ]
    for case, make in ways:
        yield attempt("g", case, measure, make)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        data.tofile(path)
        mapped = np.memmap(path, np.uint8, "r", shape=data.shape)

        def read_by_threads() -> list[jax.Array]:
            def part(number: int) -> jax.Array:
                with path.open("rb") as file:
                    file.seek(number * data.shape[1])
                    return put(np.frombuffer(file.read(data.shape[1]), np.uint8))

            with ThreadPoolExecutor(THREADS) as pool:
                return list(pool.map(part, range(CHUNKS)))

        yield attempt("g", "file, mapped", measure, lambda: lambda: put(mapped))
        yield attempt("g", f"file, read by {THREADS} threads", measure, lambda: read_by_threads)
