"""What the decoder's weights are multiplied with: `measure_inputs`, for `quantize(..., inputs=)`.

Letters: B rows, T text tokens, W decoder width, I inputs of a weight.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.fused_block import Projection
from paligemma_jax.models.jitted import Jitted
from paligemma_jax.models.paligemma import PaliGemma

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


def measure_inputs(model: PaliGemma, batches: Iterable[Texts]) -> dict[str, jax.Array]:
    """Second moments of the inputs of every decoder weight, from an unrolled model.

    Batches of one shape compile once. A few hundred texts of the kind that will be asked do. A
    weight of n inputs takes 4 n ** 2 bytes. Raises ConfigError for other models.
    """
    if not isinstance(model.llm.layers, nnx.List) or any(
        jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(model)
    ):
        raise ConfigError(
            "The layers of this model are stacked, or rounded to integers already. Layers one by "
            "one, as trained, fit. Call measure_inputs(unroll(model), batches)."
        )
    total: dict[str, jax.Array] = {}
    for texts in batches:
        found = _moments(model, texts.images, texts.tokens, texts.mask_ar, texts.real)
        total = {path: x + total[path] if total else x for path, x in found.items()}
    return total


def weight_paths(layer: int) -> dict[str, tuple[str, str]]:
    """Paths of the decoder's weights in a layer, each with the names that lead there."""
    names = (("attn", "qkv"), ("attn", "out"), ("mlp", "gate_up"), ("mlp", "down"))
    return {f"llm/layers/{layer}/{owner}/{name}": (owner, name) for owner, name in names}


@Jitted
def _moments(
    model: PaliGemma,
    images: Float[Array, "B N height width 3"],
    tokens: Int[Array, "B T"],
    mask_ar: Int[Array, "B T"],
    real: Bool[Array, "B T"],
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

    layers = model.llm.layers
    assert isinstance(layers, nnx.List)
    for number, block in enumerate(layers):
        for path, (owner, name) in weight_paths(number).items():
            holder = vars(getattr(block, owner))  # past the module, which knows modules only
            holder[name] = watched(holder[name], path)
    model.hidden(seen, tokens, mask_ar)
    return moments
