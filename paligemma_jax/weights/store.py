"""The self-contained store that `paligemma convert` writes: weights, config, processor, tokenizer.

    config.json      the architecture
    processor.json   how pictures and prompts are prepared
    tokenizer.model  the SentencePiece model
    params/          the arrays, by orbax
    MANIFEST.json    sha256 of every file and array, written last

The only module that knows orbax, which is imported when it is used.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.weights.arrays import aligned_empty, copy_into
from paligemma_jax.weights.hf_config import read_json
from paligemma_jax.weights.manifest import (
    MANIFEST,
    ArrayDigest,
    Manifest,
    digest_array,
    digest_files,
)
from paligemma_jax.weights.source import TensorSpec, largest_first
from paligemma_jax.weights.staging import staged, sync_tree
from paligemma_jax.weights.strict import require_fit
from paligemma_jax.weights.tree import expected_shapes, flatten, nest

CONFIG, PROCESSOR, TOKENIZER, PARAMS = "config.json", "processor.json", "tokenizer.model", "params"
_CHUNK = 64 << 20  # bytes; what reading and writing need beyond the array itself is a few of these
_IN_FLIGHT = 2 * _CHUNK

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class StoreContents:
    """What a store holds besides its arrays; `origin` says where the weights came from."""

    config: PaliGemmaConfig
    processor: Mapping[str, Any]
    tokenizer: bytes
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_store(
    target: Path,
    contents: StoreContents,
    arrays: Iterable[tuple[str, np.ndarray]],
    nbytes: int,
) -> None:
    """Writes a new store; `arrays` are (path, C-order array), taken and written one by one.

    `nbytes` is their size in all. An existing `target` is never touched, and an error or a kill
    leaves none. Raises CheckpointError, also where the arrays do not fit the configuration.
    """
    with staged(target, nbytes + len(contents.tokenizer)) as directory:
        settings = {
            CONFIG: {**contents.config.to_dict(), "origin": dict(contents.origin)},
            PROCESSOR: dict(contents.processor),
        }
        for name, values in settings.items():
            (directory / name).write_text(json.dumps(values, indent=1) + "\n")
        (directory / TOKENIZER).write_bytes(contents.tokenizer)
        digests = _write_arrays(directory / PARAMS, arrays)
        shapes = {name: digest.shape for name, digest in digests.items()}
        require_fit(target, shapes, expected_shapes(contents.config))
        sync_tree(directory)
        Manifest(digest_files(directory), digests).write(directory)


def _write_arrays(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> dict[str, ArrayDigest]:
    import orbax.checkpoint.experimental.v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly compress, and loading is faster
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = _IN_FLIGHT
    digests: dict[str, ArrayDigest] = {}
    with _quiet(), context, concurrent.futures.ThreadPoolExecutor(1) as pool:
        for group in _group(arrays, lambda item: item[1].nbytes):
            found = pool.map(digest_array, [array for _, array in group])
            with _as_os_error():
                ocp.partial.save(str(path), nest(dict(group)))  # writes files of its own
            digests |= zip((name for name, _ in group), found, strict=True)
            del group  # or it would stay while the next one is read
        with _as_os_error():
            ocp.partial.finalize(str(path))
    return digests


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Turns the many kinds that orbax and tensorstore raise for a failed write into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        if "RESOURCE_EXHAUSTED" in str(e):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from e
        raise OSError(errno.EIO, _first_line(e)) from e


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


class StoreSource:
    """A store; see `Source`.

    With `verify`, the files' digests are checked on opening and each array's on reading it. A given
    `config` replaces the stored one and must fit the arrays.
    """

    kind = "store"

    def __init__(self, path: Path, config: PaliGemmaConfig | None = None, *, verify: bool = True):
        self.path = path.absolute()  # orbax takes no other
        self.verify = verify
        self._manifest = Manifest.read(path)
        problems = self._manifest.find_file_problems(path, hashed=verify)
        if problems:
            raise _damaged(path, problems)
        values = read_json(path / CONFIG)
        self.origin: dict[str, Any] = values.pop("origin", {})
        try:
            self.config = config or PaliGemmaConfig.from_dict(values)
        except ConfigError as e:
            raise CheckpointError(
                f"{path / CONFIG} does not fit: {e} The one that the conversion wrote fits. "
                "Convert again: paligemma convert SOURCE TARGET"
            ) from e
        self.processor: dict[str, Any] = read_json(path / PROCESSOR)
        self.specs: dict[str, TensorSpec] = {n: d.spec for n, d in self._manifest.arrays.items()}
        require_fit(path, {n: s.shape for n, s in self.specs.items()}, expected_shapes(self.config))
        self._groups = list(_group(largest_first(self.specs), lambda n: self.specs[n].nbytes))
        self._stored: dict[str, Any] | None = None
        self._loaded: dict[str, np.ndarray] = {}

    def read_tokenizer(self) -> bytes:
        """The SentencePiece model."""
        return (self.path / TOKENIZER).read_bytes()

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        spec = self.specs[name]
        array = self._load(name)
        if array.shape != spec.shape or array.dtype != spec.dtype:
            found = f"{array.dtype} {array.shape}"
            raise _damaged(self.path, [f"{name} is {found}, not {spec.dtype} {spec.shape}"])
        result = aligned_empty(spec.shape, dtype or spec.dtype)
        if not self.verify:
            copy_into(result, array)
            return result
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            digest = pool.submit(digest_array, array)
            copy_into(result, array)
            if digest.result() != self._manifest.arrays[name]:
                raise _damaged(self.path, [f"{name} was changed (sha256 differs)"])
        return result

    def _load(self, name: str) -> np.ndarray:
        if name not in self._loaded:
            # Every call of orbax takes 20 ms, so small arrays come together.
            self._loaded = self._load_group(next(g for g in self._groups if name in g))
        return self._loaded.pop(name)

    def _load_group(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        import orbax.checkpoint.experimental.v1 as ocp

        context = ocp.Context()
        context.pytree.loading.partial_load = True
        context.memory.read_concurrent_bytes = _IN_FLIGHT
        path = str(self.path / PARAMS)
        with _quiet(), context:
            try:
                if self._stored is None:
                    self._stored = flatten(ocp.metadata(path).metadata)
                return flatten(ocp.load(path, nest({name: self._stored[name] for name in names})))
            except Exception as e:  # orbax and tensorstore raise many kinds for a damaged file
                listing = ", ".join(names)
                raise _damaged(self.path, [f"{listing} cannot be read: {_first_line(e)}"]) from e

    def close(self) -> None:
        """Nothing stays open between reads."""


def is_store(path: Path) -> bool:
    """Whether a directory is a store, or a part of one."""
    return (path / MANIFEST).exists() or (path / PARAMS).is_dir()


def _damaged(path: Path, problems: list[str]) -> CheckpointError:
    listing = "\n  ".join(problems)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return CheckpointError(
        f"{path} is damaged ({count}):\n"
        f"  {listing}\n"
        "A store exactly as it was converted fits. Copy it again, or convert again: paligemma "
        "convert SOURCE TARGET"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[
        :200
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from logging: pages for an error that is raised all the same, and advice."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
