"""Checkpoints of random weights in Hugging Face's layout: the same for every implementation.

They are made fast, and tame in any depth: each value is read at a random place of a table of normal
quantiles, 16 random bits per weight, equal in all dtypes but for rounding.
"""

import dataclasses
import functools
import json
import math
import statistics
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.filesystem import staged
from paligemma_jax.weights.hf_config import hf_config, hf_generation, hf_preprocessor, padded_rows
from paligemma_jax.weights.huggingface import (
    EMBEDDING,
    HFTensor,
    hf_tensors,
    part_shape,
    published_key,
)
from paligemma_jax.weights.safetensors_io import write_shards
from paligemma_jax.weights.tensors import FLOATS, TensorSpec, as_float_dtype, expected_shapes

_EOS = 1
_UNLIKELY = 2.0**-8  # scale of embeddings whose logits shall never be the highest
_BLOCK = 65_536  # values made at once; they and the quantiles stay in the cache
_RECORD = "random-weights.json"
_VERSION = 1  # of the values: another one makes other weights from the same seed
_PUBLISHED_CAP = 30.0  # on PaliGemma 2's logits, in Hugging Face's files

Shape = tuple[int, ...]


class RandomTensors:
    """Every tensor of a checkpoint in Hugging Face's layout, from a configuration and a seed.

    Weights are scaled by their fan-in, so that activations keep their size. Decoder blocks add much
    more to the residual stream than the token put into it: otherwise the tied embeddings would
    answer every token with itself. Logits have a deviation of about 1. Those of EOS and of the
    table's padding are near 0, so that no generation ends or holds a token that does not exist.

    Attributes:
      entries: canonical key -> the tensor's place in the table of names, its layer, and its shape,
        padding included.
    """

    def __init__(self, config: PaliGemmaConfig, *, seed: int, dtype: str):
        self._config = config
        self._seed = seed
        self._dtype = FLOATS[dtype]
        ours = expected_shapes(config)
        self.entries: dict[str, tuple[HFTensor, int, Shape]] = {}
        for tensor in hf_tensors(config):
            shape = tensor.shape(part_shape(tensor, ours[tensor.path]))
            if tensor.key == EMBEDDING:
                shape = (padded_rows(shape[0]), *shape[1:])
            for layer in range(ours[tensor.path][0] if tensor.layered else 1):
                self.entries[tensor.key.format(layer)] = (tensor, layer, shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        values = sum(math.prod(shape) for *_, shape in self.entries.values())
        return values * self._dtype.itemsize

    def blocks(self, key: str) -> Iterator[np.ndarray]:
        """One tensor as consecutive blocks along its leading axis."""
        tensor, layer, shape = self.entries[key]
        mean, deviation = _distribution(tensor, layer, shape, self._config.llm)
        quantiles = (mean + deviation * _normal_quantiles()).astype(self._dtype)
        random = np.random.SFC64([self._seed, zlib.crc32(key.encode())])
        row = math.prod(shape[1:])
        step = max(1, _BLOCK // row)
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            places = random.random_raw(-(-rows * row // 4)).view(np.uint16)[: rows * row]
            values = quantiles.take(places).reshape(rows, *shape[1:])
            if tensor.key == EMBEDDING:
                token = np.arange(start, start + rows)
                unlikely = (token == _EOS) | (token >= self._config.llm.vocab_size)
                values[unlikely] *= values.dtype.type(_UNLIKELY)
            yield values

    def whole(self, key: str) -> np.ndarray:
        """One tensor."""
        return np.concatenate(list(self.blocks(key)))


def _distribution(
    tensor: HFTensor, layer: int, shape: Shape, llm: GemmaConfig
) -> tuple[float, float]:
    """Mean and standard deviation of a tensor of `shape` (out, in, ...)."""
    path = tensor.path
    name = path.rpartition("/")[2]
    by_fan_in = math.prod(shape[1:]) ** -0.5
    if name == "bias":
        return 0.0, 0.05
    if name == "pos_embed":
        return 0.0, 0.5
    if path.startswith("img/"):
        return (1.0, 0.1) if name == "scale" else (0.0, by_fan_in)
    if name == "scale":
        gain = _block_gain(path, layer, llm)
        return gain - 1, 0.1 * gain  # Gemma's RMSNorm is stored less one
    if path.endswith("q_einsum/w"):
        return 0.0, 2 * by_fan_in  # attention that is not uniform
    gain = 1.0 if llm.post_norms else _block_gain(path, layer, llm)
    return 0.0, gain * by_fan_in


def _block_gain(path: str, layer: int, llm: GemmaConfig) -> float:
    """How much larger than its input the output of a decoder block is; 1 inside blocks.

    Together the blocks make the residual stream width**0.5 times a token's embedding. The first
    attention adds no more than the token, which would be lost in what all positions have in common.
    """
    gain = max(1.0, 1.5 * (llm.width / llm.depth) ** 0.5)
    if path.endswith(("mlp/linear/w", "post_ffw_norm/scale")):
        return gain
    if path.endswith(("attn_vec_einsum/w", "post_attention_norm/scale")):
        return gain / 2 if layer else 1.0
    return 1.0


@functools.cache
def _normal_quantiles() -> np.ndarray:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65_536) for i in range(65_536)])


def write_weights(
    directory: Path,
    config: PaliGemmaConfig,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the safetensors files of a directory as published, one tensor at a time."""
    tensors = RandomTensors(config, seed=seed, dtype=dtype)
    shapes = {published_key(key): shape for key, (*_, shape) in tensors.entries.items()}
    specs = {key: TensorSpec(shape, FLOATS[dtype]) for key, shape in shapes.items()}
    with write_shards(directory, specs, shard_bytes) as shards:
        for key in tensors.entries:
            row = 0
            for block in tensors.blocks(key):
                shards.write(published_key(key), block, row)
                row += len(block)


def write_checkpoint(
    folder: Path, config: PaliGemmaConfig, *, seed: int = 0, dtype: str = "bfloat16"
) -> Path:
    """Writes random weights for `config` as a Hugging Face directory, and returns `folder`.

    Equal arguments give equal files, and files that are there already are taken as they are. As in
    the published repositories, PaliGemma 2 has a soft cap of 30 on its logits. There is no
    tokenizer. The directory appears when it is complete.

    Raises CheckpointError if `folder` exists and holds something else, or cannot be written.
    """
    dtype = as_float_dtype(dtype).name
    if config.llm.post_norms and not config.llm.final_logit_softcap:
        llm = dataclasses.replace(config.llm, final_logit_softcap=_PUBLISHED_CAP)
        config = dataclasses.replace(config, llm=llm)
    record = {"version": _VERSION, "seed": seed, "dtype": dtype, "config": config.to_dict()}
    if folder.exists():
        if _read(folder / _RECORD) == record:
            return folder
        raise CheckpointError(
            f"expected these random weights or no directory, got others in {str(folder)!r}. "
            "Choose another directory: paligemma bench --weights DIR"
        )
    configs = {
        "config.json": hf_config(config, dtype, None),
        "generation_config.json": hf_generation(config),
        "preprocessor_config.json": hf_preprocessor(config),
        _RECORD: record,
    }
    with staged(folder, RandomTensors(config, seed=seed, dtype=dtype).nbytes) as directory:
        write_weights(directory, config, seed=seed, dtype=dtype)
        for name, values in configs.items():
            (directory / name).write_text(json.dumps(values, indent=2))
    return folder


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
