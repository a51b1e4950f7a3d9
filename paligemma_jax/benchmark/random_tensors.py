"""Random weights for checkpoints that are measured and not asked: made fast, and tame in any depth.

Values are read at random places of a table of normal quantiles, 16 random bits each: a few
nanoseconds a weight in any dtype, and equal in all dtypes but for rounding.
"""

import functools
import math
import statistics
import zlib
from collections.abc import Iterator

import numpy as np

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig
from paligemma_jax.weights.arrays import FLOATS
from paligemma_jax.weights.hf_names import EMBEDDING, HFTensor, hf_tensors, part_shape
from paligemma_jax.weights.tree import expected_shapes

FILLER_ROWS = 64  # Hugging Face pads its table to a multiple of 64, the image placeholder included
_EOS = 1
_UNLIKELY = 2.0**-8  # of rows whose logits shall never be the highest
_BLOCK = 65_536  # values made at once; they and the table stay in the cache

Shape = tuple[int, ...]


class RandomTensors:
    """Every tensor of a checkpoint in Hugging Face's layout, from a configuration and a seed.

    Weights are scaled by their fan-in, so that activations keep their size. Decoder blocks add much
    more to the residual stream than the token put into it: otherwise the tied table would answer
    every token with itself. Logits have a deviation of about 1. Those of EOS and of the rows that
    fill the table up are near 0, so that no answer ends and none holds a token that is no token.

    Attributes:
      entries: canonical key -> the tensor's row of the table of names, its layer, and its shape,
        filler rows included.
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
                shape = (shape[0] + FILLER_ROWS, *shape[1:])
            for layer in range(ours[tensor.path][0] if tensor.layered else 1):
                self.entries[tensor.key.format(layer)] = (tensor, layer, shape)

    def nbytes(self, key: str) -> int:
        """Bytes of one tensor."""
        return math.prod(self.entries[key][2]) * self._dtype.itemsize

    def blocks(self, key: str) -> Iterator[np.ndarray]:
        """One tensor as consecutive groups of whole rows of its leading axis."""
        tensor, layer, shape = self.entries[key]
        table = _quantiles(*_spread(tensor, layer, shape, self._config.llm), self._dtype)
        random = np.random.SFC64([self._seed, zlib.crc32(key.encode())])
        row = math.prod(shape[1:])
        step = max(1, _BLOCK // row)
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            places = random.random_raw(-(-rows * row // 4)).view(np.uint16)[: rows * row]
            values = table.take(places).reshape(rows, *shape[1:])
            if tensor.key == EMBEDDING:
                place = np.arange(start, start + rows)
                unlikely = (place == _EOS) | (place >= self._config.llm.vocab_size)
                values[unlikely] *= values.dtype.type(_UNLIKELY)
            yield values

    def whole(self, key: str) -> np.ndarray:
        """One tensor."""
        return np.concatenate(list(self.blocks(key)))


def _spread(tensor: HFTensor, layer: int, shape: Shape, llm: GemmaConfig) -> tuple[float, float]:
    """Mean and standard deviation of a tensor of `shape` (out, in, ...)."""
    path = tensor.path
    name = path.rpartition("/")[2]
    if name == "bias":
        return 0.0, 0.05
    if name == "pos_embed":
        return 0.0, 0.5
    if path.startswith("img/"):
        return (1.0, 0.1) if name == "scale" else (0.0, _by_fan_in(shape))
    if name == "scale":
        gain = _block_gain(path, layer, llm)
        return gain - 1, 0.1 * gain  # Gemma's RMSNorm is stored less one
    if path.endswith("q_einsum/w"):
        return 0.0, 2 * _by_fan_in(shape)  # attention that looks somewhere
    gain = 1.0 if llm.post_norms else _block_gain(path, layer, llm)
    return 0.0, gain * _by_fan_in(shape)


def _by_fan_in(shape: Shape) -> float:
    return math.prod(shape[1:]) ** -0.5


def _block_gain(path: str, layer: int, llm: GemmaConfig) -> float:
    """How much larger than its input the output of a decoder's block is; 1 inside blocks.

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


def _quantiles(mean: float, deviation: float, dtype: np.dtype) -> np.ndarray:
    return (mean + deviation * _normal_quantiles()).astype(dtype)
