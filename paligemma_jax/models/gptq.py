"""GPTQ (arXiv 2210.17323): 4-bit weights that lose least of what they are multiplied with.

`measure_inputs` sums up the second moments of the inputs of decoder layers, `gptq_matrix` quantizes
by them.

Letters: B batch, T text tokens, W decoder width, O output channels, I inputs of a weight, G groups
of inputs with a scale each, S inputs of a group.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float, Int

from paligemma_jax.config import GemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.linear import Projection
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization_config import Int4
from paligemma_jax.models.quantized_matrix import (
    QuantizedMatrix,
    int4_matrix,
    is_quantized_array,
    quantize_int4,
    scale_dtype,
)

_DAMPING = 0.01  # of the mean second moment: inputs that never vary would divide by 0

# Sums of x_i x_j over all inputs x of a weight, by its path such as "llm/layers/0/mlp/down".
InputMoments = Mapping[str, Float[Array, "I I"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """Images with prompts and answers to calibrate on."""

    images: jax.Array  # f32[B, N, height, width, 3]
    tokens: jax.Array  # i32[B, T]
    mask_ar: jax.Array  # i32[B, T]
    real: jax.Array  # bool[B, T], False at padding, which stands at the end


def measure_inputs(
    model: PaliGemma, batches: Iterable[Texts], *, layers: range | None = None
) -> dict[str, jax.Array]:
    """Second moments of the inputs of every weight of decoder layers, from an unstacked model.

    Batches of one shape compile once. A few hundred texts of the kind that will be asked do. A
    weight of n inputs takes 4 n ** 2 bytes; where that is too much for all together, ask for some
    `layers` at a time (see `calibrate_in_place`). Raises ConfigError for other models.
    """
    blocks = model.llm.layers
    some = range(model.config.llm.depth) if layers is None else layers
    if not isinstance(blocks, nnx.List) or any(
        is_quantized_array(leaf) for number in some for leaf in jax.tree.leaves(blocks[number])
    ):
        raise ConfigError(
            "Expected unstacked layers that are not quantized. Call "
            "measure_inputs(unstack_layers(model), batches)."
        )
    total: dict[str, jax.Array] = {}
    for texts in batches:
        found = _moments(model, texts, layers=tuple(some))
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
def _moments(model: PaliGemma, texts: Texts, layers: tuple[int, ...]) -> dict[str, jax.Array]:
    image_tokens = model.encode_images(texts.images)
    counted = jnp.concatenate([jnp.ones(image_tokens.shape[:2], bool), texts.real], axis=1)
    moments: dict[str, jax.Array] = {}

    def measured(layer: Projection, path: str) -> Callable[[jax.Array], jax.Array]:
        def call(x: jax.Array) -> jax.Array:
            inputs = math.prod(x.shape[-len(layer.axes.inputs) :])
            rows = x.reshape(-1, inputs).astype(jnp.float32) * counted.reshape(-1, 1)
            moments[path] = rows.T @ rows
            return layer(x)

        return call

    blocks = model.llm.layers
    assert isinstance(blocks, nnx.List)
    for number in layers:
        block = blocks[number]
        for path, (owner, name) in weight_paths(number).items():
            holder = vars(getattr(block, owner))  # past the module, which knows modules only
            holder[name] = measured(holder[name], path)
    model.hidden(image_tokens, texts.tokens, texts.mask_ar)
    return moments


def gptq_matrix(
    matrix: Float[Array, "O I"], moments: Float[Array, "I I"], format: Int4
) -> QuantizedMatrix:
    """As `quantize_matrix`, with less error of the matmul instead of the matrix.

    `moments` are sums of x_i x_j over the inputs x it will see.
    """
    groups = format.groups(matrix.shape[1])
    return int4_matrix(*quantize_by_moments(matrix, moments, groups))


def quantize_by_moments(
    matrix: Float[Array, "O I"], moments: Float[Array, "I I"], groups: int = 1
) -> tuple[Int[Array, "O I"], Float[Array, "O G"]]:
    """As `quantize_int4`, input after input.

    What one loses is given to those that are left, as far as they vary with it.
    """
    inputs = matrix.shape[1]
    size = inputs // groups
    upper = _factor(moments)

    def quantize_group(
        left: Float[Array, "O I"], start: Int[Array, ""]
    ) -> tuple[Float[Array, "O I"], tuple[Int[Array, "O S"], Float[Array, "O"]]]:  # noqa: F821
        columns = jax.lax.dynamic_slice_in_dim(left, start, size, axis=1)
        below = jax.lax.dynamic_slice_in_dim(upper, start, size)
        among = jax.lax.dynamic_slice_in_dim(below, start, size, axis=1)
        scale = quantize_int4(columns, 1, scale_dtype(groups))[1][:, 0]
        step = scale.astype(jnp.float32)

        def quantize_column(
            j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            columns, integers, lost = carry
            column = columns[:, j]
            quantized = jnp.clip(jnp.round(column / step), -8, 7)
            loss = (column - quantized * step) / among[j, j]
            columns = columns - loss[:, None] * among[j][None]  # 0 for those that are done
            return columns, integers.at[:, j].set(quantized), lost.at[:, j].set(loss)

        zeros = jnp.zeros_like(columns)
        _, integers, lost = jax.lax.fori_loop(0, size, quantize_column, (columns, zeros, zeros))
        return left - lost @ below, (integers.astype(jnp.int8), scale)

    starts = jnp.arange(0, inputs, size)
    _, (integers, scale) = jax.lax.scan(quantize_group, matrix.astype(jnp.float32), starts)
    return integers.transpose(1, 0, 2).reshape(matrix.shape), scale.T


def _factor(moments: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """Upper triangular U with U^T U the inverse of the damped moments."""
    size = moments.shape[0]
    mean = jnp.trace(moments) / size
    unit = jnp.where(mean > 0, mean, 1.0)  # or small moments would vanish in float32
    damped = moments.astype(jnp.float32) / unit + _DAMPING * jnp.eye(size)
    inverse = cho_solve((jnp.linalg.cholesky(damped), True), jnp.eye(size))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T
