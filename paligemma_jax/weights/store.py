"""The self-contained store that `paligemma convert` writes: weights, config, processor, tokenizer.

config.json      the architecture
processor.json   how pictures and prompts are prepared
tokenizer.model  the SentencePiece model
mask_codec.npz   the codec of <seg> tokens, where there is one
params/          the arrays, by orbax: each layer of a parameter by itself
MANIFEST.json    sha256 of every file and array, written last
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.weights.arrays import aligned_empty
from paligemma_jax.weights.companions import MASK_CODEC
from paligemma_jax.weights.contents import Contents
from paligemma_jax.weights.json_file import read_json
from paligemma_jax.weights.manifest import MANIFEST, Manifest, digest_files
from paligemma_jax.weights.orbax_tree import write_tree
from paligemma_jax.weights.source import Fill, TensorSpec, Weights, largest_first, piece_shapes
from paligemma_jax.weights.staging import sync_tree
from paligemma_jax.weights.store_arrays import PARAMS, damaged, open_arrays, stored_names
from paligemma_jax.weights.tree import expected_shapes

CONFIG, PROCESSOR, TOKENIZER = "config.json", "processor.json", "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Orbax:
    """Our store; it keeps everything, loads fastest, and carries digests of all its arrays."""

    name: ClassVar[str] = "orbax"

    def is_file(self, target: Path) -> bool:
        """Whether `target` is to be one file."""
        return False

    def needs_tokenizer(self, target: Path) -> bool:
        """Whether a tokenizer goes along."""
        return True

    def check(self, target: Path, weights: Weights) -> None:
        """Raises for what cannot be written, before anything is."""

    def write(self, target: Path, weights: Weights, contents: Contents) -> None:
        """Writes into an empty directory, layer by layer."""
        settings = {
            CONFIG: {**weights.config.to_dict(), "origin": dict(contents.origin)},
            PROCESSOR: dict(contents.processor),
        }
        for name, values in settings.items():
            (target / name).write_text(json.dumps(values, indent=1) + "\n")
        (target / TOKENIZER).write_bytes(contents.tokenizer or b"")
        if contents.mask_codec is not None:
            (target / MASK_CODEC).write_bytes(contents.mask_codec)
        digests = write_tree(target / PARAMS, arrays_to_store(weights))
        sync_tree(target)
        Manifest(digest_files(target), digests).write(target)


def arrays_to_store(weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a store by their paths, read one by one."""
    for name in largest_first(weights.specs):
        spec = weights.specs[name]
        names, shapes = stored_names(name, spec.shape), piece_shapes(name, spec.shape)
        for part, shape, fill in zip(names, shapes, weights.pieces(name, spec.dtype), strict=True):
            array = aligned_empty(shape, spec.dtype)
            fill(array)
            yield part, array
            del array  # or it would stay while the next one is read


class StoreSource:
    """A store; see `Source`.

    With `verify`, the small files' digests are checked on opening, and each array's on reading it.
    A given `config` replaces the stored one and must fit the arrays.
    """

    kind = "store"

    def __init__(self, path: Path, config: PaliGemmaConfig | None = None, *, verify: bool = True):
        self.path = path.absolute()  # orbax takes no other
        manifest = Manifest.read(path)
        problems = manifest.find_lost_files(path)
        if verify and not problems:
            # Arrays are checked when they are read.
            for name in (CONFIG, PROCESSOR, TOKENIZER, MASK_CODEC):
                problems += manifest.find_changed_files(path, name)
        if problems:
            raise damaged(path, problems)
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
        shapes = expected_shapes(self.config)
        self._arrays = open_arrays(self.path, manifest, shapes, verify=verify)
        self.specs: dict[str, TensorSpec] = dict(self._arrays.specs)

    def read_tokenizer(self) -> bytes:
        """The SentencePiece model."""
        return (self.path / TOKENIZER).read_bytes()

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        return self._arrays.pieces(name, dtype)

    @property
    def sliceable(self) -> Any:
        """What reads one piece without the others, if it can be; see `read_boxes`."""
        return getattr(self._arrays, "sliceable", None)

    def close(self) -> None:
        """Nothing stays open between reads."""


def is_store(path: Path) -> bool:
    """Whether a directory is a store, or a part of one."""
    return (path / MANIFEST).exists() or (path / PARAMS).is_dir()
