"""The self-contained store that `paligemma convert` writes: weights, config, processor, tokenizer.

config.json      the architecture
processor.json   how pictures and prompts are prepared
tokenizer.model  the SentencePiece model
mask_codec.npz   the codec of <seg> tokens, where there is one
params/          the arrays, by orbax
MANIFEST.json    sha256 of every file and array, written last
"""

import concurrent.futures
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.weights.arrays import copy_into
from paligemma_jax.weights.json_file import read_json
from paligemma_jax.weights.manifest import (
    MANIFEST,
    Manifest,
    digest_array,
    digest_files,
)
from paligemma_jax.weights.orbax_tree import TreeReader, write_tree
from paligemma_jax.weights.source import LAYERED, Fill, TensorSpec
from paligemma_jax.weights.staging import staged, sync_tree
from paligemma_jax.weights.strict import require_fit
from paligemma_jax.weights.tree import expected_shapes

CONFIG, PROCESSOR, TOKENIZER, PARAMS = "config.json", "processor.json", "tokenizer.model", "params"
MASK_CODEC = "mask_codec.npz"


@dataclasses.dataclass(frozen=True)
class StoreContents:
    """What a store holds besides its arrays; `origin` says where the weights came from."""

    config: PaliGemmaConfig
    processor: Mapping[str, Any]
    tokenizer: bytes
    mask_codec: bytes | None = None
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
    companions = len(contents.tokenizer) + len(contents.mask_codec or b"")
    with staged(target, nbytes + companions) as directory:
        settings = {
            CONFIG: {**contents.config.to_dict(), "origin": dict(contents.origin)},
            PROCESSOR: dict(contents.processor),
        }
        for name, values in settings.items():
            (directory / name).write_text(json.dumps(values, indent=1) + "\n")
        (directory / TOKENIZER).write_bytes(contents.tokenizer)
        if contents.mask_codec is not None:
            (directory / MASK_CODEC).write_bytes(contents.mask_codec)
        digests = write_tree(directory / PARAMS, arrays)
        shapes = {name: digest.shape for name, digest in digests.items()}
        require_fit(target, shapes, expected_shapes(contents.config))
        sync_tree(directory)
        Manifest(digest_files(directory), digests).write(directory)


class StoreSource:
    """A store; see `Source`.

    With `verify`, the small files' digests are checked on opening, and each array's on reading it.
    A given `config` replaces the stored one and must fit the arrays.
    """

    kind = "store"

    def __init__(self, path: Path, config: PaliGemmaConfig | None = None, *, verify: bool = True):
        self.path = path.absolute()  # orbax takes no other
        self.verify = verify
        self._manifest = Manifest.read(path)
        problems = self._manifest.find_lost_files(path)
        if verify and not problems:
            # Arrays are checked when they are read.
            for name in (CONFIG, PROCESSOR, TOKENIZER, MASK_CODEC):
                problems += self._manifest.find_changed_files(path, name)
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
        self._tree = TreeReader(path / PARAMS, self.specs)
        self._files_verified = not verify

    def read_tokenizer(self) -> bytes:
        """The SentencePiece model."""
        return (self.path / TOKENIZER).read_bytes()

    def layers(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        stored = self.specs[name].dtype
        if dtype.itemsize < stored.itemsize:
            # The wide array is never whole in memory, where its digest could be taken.
            self._verify_files()
            yield from _parts(name, self._load(name, dtype))
            return
        array = self._load(name, stored)
        if not self.verify:
            yield from _parts(name, array)
            return
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            digest = pool.submit(digest_array, array)
            yield from _parts(name, array)
            if digest.result() != self._manifest.arrays[name]:
                raise _damaged(self.path, [f"{name} was changed (sha256 differs)"])

    def _load(self, name: str, dtype: np.dtype) -> np.ndarray:
        try:
            return self._tree.read(name, dtype)
        except OSError as e:
            raise _damaged(self.path, [f"{name} cannot be read: {e.strerror}"]) from e

    def _verify_files(self) -> None:
        if not self._files_verified:
            problems = self._manifest.find_changed_files(self.path, f"{PARAMS}/")
            if problems:
                raise _damaged(self.path, problems)
            self._files_verified = True

    def close(self) -> None:
        """Nothing stays open between reads."""


def _parts(name: str, array: np.ndarray) -> Iterator[Fill]:
    for part in array if name.startswith(LAYERED) else [array]:
        yield functools.partial(_copy, part)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    copy_into(target, source)


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
