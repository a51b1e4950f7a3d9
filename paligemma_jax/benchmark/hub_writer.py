"""A Hugging Face directory of random weights, written one tensor at a time."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.benchmark.hub_files import hub_config
from paligemma_jax.benchmark.random_tensors import RandomTensors
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.arrays import FLOATS
from paligemma_jax.weights.hf_config_writer import hf_generation, hf_preprocessor
from paligemma_jax.weights.hf_names import published_key
from paligemma_jax.weights.safetensors_writer import write_shards
from paligemma_jax.weights.source import TensorSpec


def write_hugging_face(
    directory: Path,
    config: PaliGemmaConfig,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = 5_000_000_000,
    rename: Callable[[str], str] = published_key,
) -> None:
    """A directory as published: old key layout, shards with an index, sparse configs.

    `rename` maps canonical keys to another layout. One shard makes a single model.safetensors.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = RandomTensors(config, seed=seed, dtype=dtype)
    specs = {
        rename(k): TensorSpec(shape, FLOATS[dtype]) for k, (*_, shape) in tensors.entries.items()
    }
    with write_shards(directory, specs, shard_bytes) as shards:
        for key in tensors.entries:
            row = 0
            for block in tensors.blocks(key):
                shards.write(rename(key), block, row)
                row += len(block)
    _write_json(directory / "config.json", hub_config(config, dtype))
    _write_json(directory / "generation_config.json", hf_generation(config))
    _write_json(directory / "preprocessor_config.json", hf_preprocessor(config))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2))
