"""How large a model is: exact parameters of each part, and memory at each precision."""

import math

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig
from paligemma_jax.weights.tree import expected_shapes

# Bits of one weight. The scales that int8 and int4 need beside the weights are not counted.
PRECISIONS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
_PARTS = {
    "img/head": "projection",
    "img": "image encoder",
    "llm/embedder": "token embeddings",
    "llm/lm_head": "output head",
    "llm": "decoder layers",
}


def parameter_counts(config: PaliGemmaConfig) -> dict[str, int]:
    """Exact number of weights of each part of the model that `config` describes."""
    counts: dict[str, int] = {}
    for path, shape in expected_shapes(config).items():
        part = next(name for prefix, name in _PARTS.items() if path.startswith(prefix + "/"))
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return counts


def weight_bytes(config: PaliGemmaConfig) -> dict[str, int]:
    """Bytes of all weights at each of `PRECISIONS`."""
    total = sum(parameter_counts(config).values())
    return {name: math.ceil(total * bits / 8) for name, bits in PRECISIONS.items()}


def cache_bytes_per_token(config: GemmaConfig, bits: int) -> int:
    """Bytes that keys and values of one token of one sequence take at `bits` a number."""
    return 2 * config.depth * config.num_kv_heads * config.head_dim * bits // 8
