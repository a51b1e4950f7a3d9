"""Numpy arrays that JAX on CPU takes over without copying, and fast copies into them."""

from typing import Any

import ml_dtypes
import numpy as np

from paligemma_jax.errors import ConfigError

DTypeLike = Any  # a name such as "bfloat16", a numpy or a JAX dtype

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}
# What stores may hold: floats, and numbers of few bits.
NUMBERS = {**FLOATS, **{d.name: d for d in map(np.dtype, (np.int8, ml_dtypes.float8_e4m3fn))}}
_ALIGNMENT = 64  # bytes; jax.device_put on CPU aliases arrays that start at a multiple of it
_STRIP = 32  # columns; a strip of both sides of a transposition stays in the cache (5x faster)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised C-order array whose data starts at a multiple of 64 bytes."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def as_bytes(array: np.ndarray) -> memoryview:
    """The memory of a C-order array."""
    return array.reshape(-1).view(np.uint8).data


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source for equal shapes, with a cast where dtypes differ.

    Transposed sources are copied strip by strip: numpy alone walks one side against the cache.
    """
    if source.dtype != target.dtype:
        source = np.asarray(source).astype(target.dtype)
    raw = np.dtype(f"u{target.itemsize}")  # numpy copies unsigned integers faster than bfloat16
    source, target = source.view(raw), target.view(raw)
    if target.ndim < 2 or source.flags.c_contiguous:
        np.copyto(target, source)
        return
    if target.ndim > 2:
        for part, of in zip(target, source, strict=True):
            copy_into(part, of)
        return
    for i in range(0, target.shape[1], _STRIP):
        target[:, i : i + _STRIP] = source[:, i : i + _STRIP]


def as_float_dtype(dtype: DTypeLike) -> np.dtype:
    """A floating dtype parameters can have; ConfigError for any other."""
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigError(
            f"Parameters of dtype {name} cannot be loaded. float32, bfloat16 and float16 fit. "
            'Say for example: dtype="bfloat16"'
        )
    return FLOATS[name]
