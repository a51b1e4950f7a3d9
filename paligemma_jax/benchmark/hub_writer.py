"""A Hugging Face directory of random weights, written one tensor at a time."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from paligemma_jax.benchmark.hub_files import hub_config, hub_generation, hub_key, hub_preprocessor
from paligemma_jax.benchmark.random_tensors import RandomTensors
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.arrays import as_bytes

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_hugging_face(
    directory: Path,
    config: PaliGemmaConfig,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = 5_000_000_000,
    rename: Callable[[str], str] = hub_key,
) -> None:
    """A directory as published: old key layout, shards with an index, sparse configs.

    `rename` maps canonical keys to another layout. One shard makes a single model.safetensors.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = RandomTensors(config, seed=seed, dtype=dtype)
    shards = _shards(tensors, shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    weight_map = {}
    total = 0
    for name, keys in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            shapes = {rename(key): tensors.entries[key][2] for key in keys}
            total += write_safetensors_header(file, shapes, _SAFETENSORS[dtype])
            for key in keys:
                for block in tensors.blocks(key):
                    file.write(as_bytes(block))
        weight_map |= {rename(key): name for key in keys}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", hub_config(config, dtype))
    _write_json(directory / "generation_config.json", hub_generation(config))
    _write_json(directory / "preprocessor_config.json", hub_preprocessor(config))


def _shards(tensors: RandomTensors, shard_bytes: int) -> list[list[str]]:
    """Keys in their order, a new list where one of `shard_bytes` is full."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key in tensors.entries:
        size = tensors.nbytes(key)
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2))


def write_safetensors_header(
    file: IO[bytes], shapes: Mapping[str, tuple[int, ...]], kind: str
) -> int:
    """The header of tensors that follow in this order; returns their bytes in all."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    itemsize = 4 if kind == "F32" else 2
    for key, shape in shapes.items():
        end = offset + math.prod(shape) * itemsize
        header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return offset
