"""The self-contained store that `paligemma convert` writes: weights, config, processor, tokenizer.

config.json      the architecture
processor.json   how pictures and prompts are prepared
tokenizer.model  the SentencePiece model
mask_codec.npz   the codec of <seg> tokens, where there is one
params/          the arrays, by orbax: each layer of a parameter by itself
MANIFEST.json    sha256 of every file and array, written last

Weights of few bits are stored as they are multiplied, in PATH/matrix/values and PATH/matrix/scale.
PATH is that of the unrolled model ("llm/layers/attn/qkv"); those of 4 bits are `Pairs`.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.models.recipe import Mixed, recipe_from_names, recipe_names
from paligemma_jax.models.recipe_text import FITTING
from paligemma_jax.weights.companions import MASK_CODEC
from paligemma_jax.weights.contents import Contents
from paligemma_jax.weights.json_file import read_json
from paligemma_jax.weights.manifest import FEW_BITS, MANIFEST, PIECES, Manifest, digest_files
from paligemma_jax.weights.orbax_tree import write_tree
from paligemma_jax.weights.rounded_weights import few_bit_specs, float_shapes
from paligemma_jax.weights.source import Fill, TensorSpec, Weights, families, read_pieces
from paligemma_jax.weights.staging import sync_tree
from paligemma_jax.weights.store_arrays import PARAMS, damaged, open_arrays, stored_names

QUANTIZATION = "quantization"  # in config.json: the format of each kind of weight
CONFIG, PROCESSOR, TOKENIZER = "config.json", "processor.json", "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Orbax:
    """Our store; it keeps everything, loads fastest, and carries digests of all its arrays."""

    name: ClassVar[str] = "orbax"
    few_bits: ClassVar[bool] = True

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
        recipe = contents.recipe
        settings: dict[str, dict[str, Any]] = {
            CONFIG: {**weights.config.to_dict(), "origin": dict(contents.origin)},
            PROCESSOR: dict(contents.processor),
        }
        if recipe is not None:
            settings[CONFIG][QUANTIZATION] = recipe_names(recipe)
        for name, values in settings.items():
            (target / name).write_text(json.dumps(values, indent=1) + "\n")
        (target / TOKENIZER).write_bytes(contents.tokenizer or b"")
        if contents.mask_codec is not None:
            (target / MASK_CODEC).write_bytes(contents.mask_codec)
        digests = write_tree(target / PARAMS, arrays_to_store(weights))
        sync_tree(target)
        version = PIECES if recipe is None else FEW_BITS
        Manifest(digest_files(target), digests, version).write(target)


def arrays_to_store(weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a store by their paths, read one by one."""
    for family in families(weights.specs):
        names = [stored_names(name, weights.specs[name].shape) for name in family]
        pieces = read_pieces(weights, family)
        for parts, arrays in zip(zip(*names, strict=True), pieces, strict=True):
            yield from zip(parts, arrays, strict=True)
            del arrays  # or they would stay while the next ones are read


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
        self.recipe = _read_recipe(path, values.pop(QUANTIZATION, None))
        try:
            self.config = config or PaliGemmaConfig.from_dict(values)
        except ConfigError as e:
            raise CheckpointError(
                f"{path / CONFIG} does not fit: {e} The one that the conversion wrote fits. "
                "Convert again: paligemma convert SOURCE TARGET"
            ) from e
        self.processor: dict[str, Any] = read_json(path / PROCESSOR)
        shapes = float_shapes(self.config, self.recipe)
        few_bits = {} if self.recipe is None else few_bit_specs(self.config, self.recipe)
        self._arrays = open_arrays(self.path, manifest, shapes, few_bits, verify=verify)
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


def _read_recipe(path: Path, names: Any) -> Mixed | None:
    try:
        if names is not None and not isinstance(names, dict):
            raise ValueError(f"{names!r} is no format for each kind of weight")
        return None if names is None else recipe_from_names(names)
    except ValueError as e:
        raise CheckpointError(
            f"{path / CONFIG} does not fit: of {QUANTIZATION}, {e}. {FITTING}. A newer library may "
            "know it: pip install --upgrade paligemma-jax"
        ) from e


def is_store(path: Path) -> bool:
    """Whether a directory is a store, or a part of one."""
    return (path / MANIFEST).exists() or (path / PARAMS).is_dir()
