"""A Hugging Face directory, written layer by layer: what transformers and its users load."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.weights.arrays import aligned_empty
from paligemma_jax.weights.companions import MASK_CODEC
from paligemma_jax.weights.contents import Contents
from paligemma_jax.weights.file_digests import write_digests
from paligemma_jax.weights.hf_config_writer import (
    hf_config,
    hf_generation,
    hf_preprocessor,
    padded_rows,
    padded_shape,
)
from paligemma_jax.weights.hf_names import HFTensor, hf_tensors, published_key
from paligemma_jax.weights.hf_tokenizer import tokenizer_files
from paligemma_jax.weights.safetensors_writer import ShardWriter, write_shards
from paligemma_jax.weights.source import (
    TABLES,
    TensorSpec,
    Weights,
    largest_first,
    piece_shapes,
)


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A directory as `save_pretrained` writes it, in the layout of the published repositories.

    All versions of transformers that know the model load it, and so do Roboflow's `deploy` and
    other programs that take such a directory. Files are of at most `shard_bytes`.
    """

    name: ClassVar[str] = "huggingface"
    few_bits: ClassVar[bool] = False
    shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ConfigError(
                f"shard_bytes is {self.shard_bytes}. A positive number of bytes fits. Say for "
                "example: HuggingFace(shard_bytes=5_000_000_000)"
            )

    def is_file(self, target: Path) -> bool:
        """Whether `target` is to be one file."""
        return False

    def needs_tokenizer(self, target: Path) -> bool:
        """Whether a tokenizer goes along."""
        return True

    def check(self, target: Path, weights: Weights) -> None:
        """Raises ConfigError for what cannot be written, before anything is."""
        hf_config(weights.config, "float32", None)

    def write(self, target: Path, weights: Weights, contents: Contents) -> None:
        """Writes into an empty directory."""
        config = weights.config
        dtype = Counter(spec.dtype.name for spec in weights.specs.values()).most_common(1)[0][0]
        window = contents.origin.get("sliding_window")
        settings = {
            "config.json": hf_config(config, dtype, window),
            "generation_config.json": hf_generation(config),
            "preprocessor_config.json": hf_preprocessor(config),
        }
        for name, values in settings.items():
            (target / name).write_text(json.dumps(values, indent=2) + "\n")
        _write_tokenizer(target, contents)
        if contents.mask_codec is not None:
            (target / MASK_CODEC).write_bytes(contents.mask_codec)
        with write_shards(target, _specs(weights), self.shard_bytes) as shards:
            for name, tensors in _by_path(config, weights).items():
                if name in TABLES:
                    _write_table(shards, weights, tensors[0])
                else:
                    _write_layers(shards, weights, tensors)
        write_digests(target)


def _write_tokenizer(directory: Path, contents: Contents) -> None:
    model = contents.tokenizer or b""
    (directory / "tokenizer.model").write_bytes(model)
    if "tokenizer.json" in contents.tokenizer_files:  # as they were published
        for name, path in contents.tokenizer_files.items():
            (directory / name).write_bytes(path.read_bytes())
        return
    for name, values in tokenizer_files(model).items():
        text = json.dumps(values, ensure_ascii=False, indent=2 if len(values) < 20 else None)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _by_path(config: PaliGemmaConfig, weights: Weights) -> dict[str, list[HFTensor]]:
    """Their tensors of each of ours, the largest first."""
    found: dict[str, list[HFTensor]] = {name: [] for name in largest_first(weights.specs)}
    for tensor in hf_tensors(config):
        found[tensor.path].append(tensor)
    return found


def _specs(weights: Weights) -> dict[str, TensorSpec]:
    """All their tensors by published name, layer after layer as the model has them."""
    specs: dict[str, TensorSpec] = {}
    for tensor in hf_tensors(weights.config):
        ours = weights.specs[tensor.path]
        layers = range(ours.shape[0]) if tensor.layered else (None,)
        shape = _shape(tensor, ours.shape)
        specs |= {
            published_key(tensor.key.format(layer)): TensorSpec(shape, ours.dtype)
            for layer in layers
        }
    return dict(sorted(specs.items(), key=lambda item: _natural(item[0])))


def _shape(tensor: HFTensor, ours: tuple[int, ...]) -> tuple[int, ...]:
    if tensor.path in TABLES:
        return padded_shape(ours)
    return tensor.shape(ours[int(tensor.layered) + int(tensor.part is not None) :])


def _natural(key: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _write_layers(shards: ShardWriter, weights: Weights, tensors: list[HFTensor]) -> None:
    """One of our parameters, whose layers are filled in where theirs lie in memory."""
    path = tensors[0].path
    spec = weights.specs[path]
    inner = piece_shapes(path, spec.shape)[0]
    parts = (len(tensors),) if tensors[0].part is not None else ()
    shape = tensors[0].shape(inner[len(parts) :])
    theirs = aligned_empty((len(tensors), *shape), spec.dtype)
    ours = _in_our_order(theirs, tensors[0], inner[len(parts) :])
    for layer, fill in enumerate(weights.pieces(path, spec.dtype)):
        fill(ours if parts else ours[0])
        for tensor, array in zip(tensors, theirs, strict=True):
            shards.write(published_key(tensor.key.format(layer)), array)


def _in_our_order(theirs: np.ndarray, tensor: HFTensor, ours: tuple[int, ...]) -> np.ndarray:
    """View of several of their tensors, joined on a first axis as ours joins them."""
    order = [axis for group in tensor.axes for axis in group]
    view = theirs.reshape([len(theirs), *(ours[axis] for axis in order)])
    return view.transpose([0, *(1 + int(place) for place in np.argsort(order))])


def _write_table(shards: ShardWriter, weights: Weights, tensor: HFTensor) -> None:
    """A table of tokens, filled up with its mean row: what is no token is never the likeliest."""
    key, spec = published_key(tensor.key), weights.specs[tensor.path]
    rows, width = spec.shape
    total = np.zeros(width, np.float64)
    row = 0
    buffer = aligned_empty((0, width), spec.dtype)
    shapes = piece_shapes(tensor.path, spec.shape)
    for shape, fill in zip(shapes, weights.pieces(tensor.path, spec.dtype), strict=True):
        if buffer.shape != shape:
            buffer = aligned_empty(shape, spec.dtype)
        fill(buffer)
        shards.write(key, buffer, row)
        total += buffer.astype(np.float32).sum(axis=0, dtype=np.float64)
        row += len(buffer)
    filler = np.empty((padded_rows(rows) - rows, width), spec.dtype)
    filler[:] = (total / rows).astype(spec.dtype)
    shards.write(key, filler, row)
