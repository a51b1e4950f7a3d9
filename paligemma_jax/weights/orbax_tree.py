"""Trees of arrays on disk, by orbax, written and read a group at a time.

No other module knows orbax. It is imported when it is used, since that takes a while.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from paligemma_jax.weights.manifest import ArrayDigest, digest_array
from paligemma_jax.weights.source import TensorSpec
from paligemma_jax.weights.tree import flatten, nest

_CHUNK = 64 << 20  # bytes; what reading and writing need beyond the array itself is a few of these
_IN_FLIGHT = 2 * _CHUNK
_GROUPS = 4  # that may be read in turn: more than a layer has parameters that are fused
_COMMITTED = "commit_success.txt"  # orbax's

T = TypeVar("T")


def write_tree(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> dict[str, ArrayDigest]:
    """Writes (path, C-order array) pairs as they come, and digests them meanwhile.

    In a run of several processes each of them calls this with the same path and arrays, since orbax
    lets all wait for all; the first one writes. Raises OSError for any failure to write; errors of
    `arrays` pass through.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly compress, and loading is faster
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = _IN_FLIGHT
    digests: dict[str, ArrayDigest] = {}
    with quiet(), context, concurrent.futures.ThreadPoolExecutor(1) as pool:
        for group in _group(arrays, lambda item: item[1].nbytes):
            found = pool.map(digest_array, [array for _, array in group])
            with as_os_error():
                ocp.partial.save(str(path), nest(dict(group)))  # writes files of its own
            digests |= zip((name for name, _ in group), found, strict=True)
            del group  # or it would stay while the next one is read
        with as_os_error():
            ocp.partial.finalize(str(path))
    mark = path / _COMMITTED
    # It is looked for, not read, and names the directory it was written in.
    if jax.process_index() == 0 and mark.exists():
        mark.write_bytes(b"")
    return digests


class TreeReader:
    """Reads arrays of a tree that are stored as `specs` say; raises OSError where they are not.

    Every call of orbax takes 20 ms, so small arrays come together: `families` are those that are
    read one after the other. Of some families at once each may be at its own place.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], families: Iterable[Sequence[str]]
    ):
        self._path = str(path.absolute())  # orbax takes no other
        self._specs = specs
        self._groups: dict[str, tuple[str, ...]] = {}
        for group in _groups(families, lambda name: specs[name].nbytes):
            self._groups |= dict.fromkeys(group, tuple(group))
        self._stored: dict[str, Any] | None = None
        self._loaded: dict[tuple[tuple[str, ...], np.dtype], dict[str, np.ndarray]] = {}

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """One array, cast chunk by chunk if `dtype` is not the stored one."""
        key = self._groups[name], dtype
        if name not in self._loaded.get(key, {}):
            self._loaded.pop(key, None)
            if len(self._loaded) >= _GROUPS:  # the oldest was left in the middle
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[key] = self._load(key[0], dtype)
        array = self._loaded[key].pop(name)
        if not self._loaded[key]:
            del self._loaded[key]
        return array

    def _load(self, names: Sequence[str], dtype: np.dtype) -> dict[str, np.ndarray]:
        import orbax.checkpoint.experimental.v1 as ocp

        context = ocp.Context()
        context.pytree.loading.partial_load = True
        context.memory.read_concurrent_bytes = _IN_FLIGHT
        with quiet(), context, as_os_error():
            if self._stored is None:
                self._stored = flatten(ocp.metadata(self._path).metadata)
            wanted = {name: self._as_stored(name, dtype) for name in names}
            return flatten(ocp.load(self._path, nest(wanted)))

    def _as_stored(self, name: str, dtype: np.dtype) -> Any:
        """orbax's description of one array, with the dtype to cast to."""
        stored, spec = (self._stored or {})[name], self._specs[name]
        # orbax would cast any stored dtype to any wanted one in silence.
        if (stored.shape, stored.dtype) != (spec.shape, spec.dtype):
            found = f"{stored.dtype} {stored.shape}"
            raise OSError(errno.EIO, f"{name} is {found}, not {spec.dtype} {spec.shape}")
        return dataclasses.replace(stored, dtype=dtype)


def _groups(families: Iterable[Sequence[str]], size: Callable[[str], int]) -> Iterator[list[str]]:
    """Names in groups of at least `_CHUNK` bytes; only small families share one."""
    small: list[str] = []
    for family in families:
        if sum(map(size, family)) < _CHUNK:
            small += family
        else:
            yield from _group(family, size)
    yield from _group(small, size)


def _group(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in groups of at least `_CHUNK` bytes."""
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        del item
        if total >= _CHUNK:
            full, group, total = group, [], 0
            yield full
            del full
    if group:
        yield group


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """Turns the many kinds that orbax and tensorstore raise into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        if "RESOURCE_EXHAUSTED" in str(e):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from e
        first = (str(e).strip().splitlines() or [""])[0]
        raise OSError(errno.EIO, f"{type(e).__name__}: {first}"[:200]) from e


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps orbax from logging: pages for an error that is raised all the same, and advice."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
