"""What the decoder's weights are multiplied with: `measure_inputs`, for `quantize(..., inputs=)`.

Letters: B rows, T text tokens, W decoder width, I inputs of a weight.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.config import GemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.gemma import Projection
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantized_matrix import is_rounded

# Sums of x_i x_j over all inputs x of a weight, by its path such as "llm/layers/0/mlp/down".
InputMoments = Mapping[str, Float[Array, "I I"]]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Pictures f32[B, N, height, width, 3] and texts i32[B, T] with answers; `real` bool[B, T]
    is False at padding, which stands at the end."""

    images: jax.Array
    tokens: jax.Array
    mask_ar: jax.Array
    real: jax.Array


def measure_inputs(
    model: PaliGemma, batches: Iterable[Texts], *, layers: range | None = None
) -> dict[str, jax.Array]:
    """Second moments of the inputs of every weight of decoder layers, from an unrolled model.

    Batches of one shape compile once. A few hundred texts of the kind that will be asked do. A
    weight of n inputs takes 4 n ** 2 bytes; where that is too much for all together, ask for some
    `layers` at a time (see `calibrate_in_place`). Raises ConfigError for other models.
    """
    blocks = model.llm.layers
    some = range(model.config.llm.depth) if layers is None else layers
    if not isinstance(blocks, nnx.List) or any(
        is_rounded(leaf) for number in some for leaf in jax.tree.leaves(blocks[number])
    ):
        raise ConfigError(
            "The layers of this model are stacked, or rounded to few bits already. Layers one by "
            "one, as trained, fit. Call measure_inputs(unroll(model), batches)."
        )
    total: dict[str, jax.Array] = {}
    for texts in batches:
        found = _moments(
            model, texts.images, texts.tokens, texts.mask_ar, texts.real, layers=tuple(some)
        )
        total = {path: x + total[path] if total else x for path, x in found.items()}
    return total


def weight_paths(layer: int) -> dict[str, tuple[str, str]]:
    """Paths of the decoder's weights in a layer, each with the names that lead there."""
    names = (("attn", "qkv"), ("attn", "out"), ("mlp", "gate_up"), ("mlp", "down"))
    return {f"llm/layers/{layer}/{owner}/{name}": (owner, name) for owner, name in names}


def moment_bytes(config: GemmaConfig) -> int:
    """What `measure_inputs` takes for one layer."""
    inputs = (config.width, config.num_heads * config.head_dim, config.width, config.mlp_dim)
    return 4 * sum(n**2 for n in inputs)


@functools.partial(Jitted, static_argnames="layers")
def _moments(
    model: PaliGemma,
    images: Float[Array, "B N height width 3"],
    tokens: Int[Array, "B T"],
    mask_ar: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    layers: tuple[int, ...],
) -> dict[str, jax.Array]:
    seen = model.encode_images(images)
    counted = jnp.concatenate([jnp.ones(seen.shape[:2], bool), real], axis=1)
    moments: dict[str, jax.Array] = {}

    def watched(layer: Projection, path: str):
        def call(x: jax.Array) -> jax.Array:
            rows = x.reshape(-1, math.prod(x.shape[x.ndim - layer.axes :])).astype(jnp.float32)
            rows = rows * counted.reshape(-1, 1)
            moments[path] = rows.T @ rows
            return layer(x)

        return call

    blocks = model.llm.layers
    assert isinstance(blocks, nnx.List)
    for number in layers:
        block = blocks[number]
        for path, (owner, name) in weight_paths(number).items():
            holder = vars(getattr(block, owner))  # past the module, which knows modules only
            holder[name] = watched(holder[name], path)
    model.hidden(seen, tokens, mask_ar)
    return moments
