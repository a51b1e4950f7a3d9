"""One array of an npz file, read from its beginning to its end."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from paligemma_jax.weights.arrays import aligned_empty, as_bytes, copy_into

_READ = 16 << 20  # bytes at once

Read = Callable[[int], bytes]


@runtime_checkable
class ArrayStream(Protocol):
    """Gives the entries of an array in C order, as many at a time as are asked for."""

    def fill(self, target: np.ndarray) -> None:
        """Copies the next `target.size` entries into an array of any strides, with a cast.

        Raises EOFError where the file ends early, and what reading it raises.
        """
        ...


class COrderStream:
    """Of an array that is stored in C order; nothing is held but what is being copied."""

    def __init__(self, read: Read, dtype: np.dtype):
        self._read = read
        self._dtype = dtype

    def fill(self, target: np.ndarray) -> None:
        if not target.flags.c_contiguous:
            part = np.empty(target.shape, self._dtype)
            read_into(self._read, as_bytes(part))
            copy_into(target, part)
        elif self._dtype == target.dtype:
            read_into(self._read, as_bytes(target))
        else:
            flat = target.reshape(-1)
            block = np.empty(_READ // self._dtype.itemsize, self._dtype)
            for start in range(0, flat.size, block.size):
                part = flat[start : start + block.size]
                read_into(self._read, as_bytes(block[: part.size]))
                copy_into(part, block[: part.size])


class FortranOrderStream:
    """Of an array that is stored in Fortran order: all of it is read at once."""

    def __init__(self, read: Read, shape: tuple[int, ...], dtype: np.dtype):
        stored = aligned_empty(shape[::-1], dtype)
        read_into(read, as_bytes(stored))
        self._array = stored.T
        self._next = 0

    def fill(self, target: np.ndarray) -> None:
        if target.ndim < self._array.ndim:
            copy_into(target, self._array[self._next])
            self._next += 1
        else:
            stop = self._next + len(target)
            copy_into(target, self._array[self._next : stop])
            self._next = stop


def read_into(read: Read, buffer: memoryview) -> None:
    """Fills a buffer block by block; EOFError where the data ends before."""
    for start in range(0, len(buffer), _READ):
        part = buffer[start : start + _READ]
        data = read(len(part))
        if len(data) < len(part):
            raise EOFError("data ends early")
        part[:] = data
