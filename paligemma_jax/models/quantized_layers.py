"""The layers whose weights may be of few bits: each stands in for one of the model's, by its call.

Letters: B batch, T tokens, W width, V vocabulary.

Products with a matrix of few bits inside of training, where the matrix itself is not trained.

Which axes of the decoder's weights are inputs, and which weights are two of them joined.

What the einsum equations of `gemma_block` say, for those who make other weights from these: layers
of few bits, adapters of low rank.

Layers that stay stacked while their weights are of few bits: a base to train adapters on.

`quantize` makes the form for inference, layers one by one; `quantize_stacked` leaves them as
training wants them, under the same paths. The rounded weights themselves are never trained.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.gemma import Embedder, Head, Projection
from paligemma_jax.models.layers import Dense, DType, Einsum
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization_config import Format, Int4, Int8Dynamic, Recipe, find_recipe
from paligemma_jax.models.quantized_matrix import Matrix


@jax.custom_vjp
def frozen_product(matrix: Matrix, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
    """`matrix.product(x)`, whose gradient is for `x` alone.

    Left to itself, JAX would keep what the weights are widened to until the gradient is taken:
    every layer in floats, at once. Here they are widened once more, one layer at a time.
    """
    return matrix.product(x)


def _forward(matrix: Matrix, x: jax.Array) -> tuple[jax.Array, tuple[Matrix, jax.Array]]:
    return matrix.product(x), (matrix, x[:0])  # of `x` only the width and the dtype are needed


def _backward(kept: tuple[Matrix, jax.Array], gradient: jax.Array) -> tuple[Any, jax.Array]:
    matrix, none = kept
    rows = jnp.zeros((gradient.shape[0], none.shape[1]), none.dtype)
    _, pull_back = jax.vjp(matrix.product, rows)
    return jax.tree.map(_zero, matrix), pull_back(gradient)[0]


def _zero(leaf: jax.Array) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)  # what JAX has for gradients of integers


frozen_product.defvjp(_forward, _backward)


class QuantizedProjection(nnx.Module):
    """Stands in for `Projection`."""

    def __init__(self, matrix: Matrix, out_shape: tuple[int, ...], axes: int, dtype: DType):
        self.out_shape = out_shape
        self.axes = axes
        self.dtype = dtype
        self.matrix = matrix

    def __call__(self, x: Float[Array, "B T *of_in"]) -> Float[Array, "B T *of_out"]:
        """Multiplied in the activation dtype, added up and given back in float32."""
        return _multiply(self.matrix, x.astype(self.dtype), self.axes, self.out_shape)


class QuantizedDense(nnx.Module):
    """Stands in for `Dense`; the bias is as it was."""

    def __init__(self, matrix: Matrix, bias: nnx.Param, axes: int, dtype: DType):
        self.axes = axes
        self.dtype = dtype
        self.matrix = matrix
        self.bias = bias

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        bias = self.bias[...].astype(jnp.float32)
        y = _multiply(self.matrix, x.astype(self.dtype), self.axes, bias.shape)
        return (y + bias).astype(self.dtype)


class QuantizedEmbedder(nnx.Module):
    """Stands in for `Embedder`: only the rows looked up are widened."""

    def __init__(self, matrix: Matrix, dtype: DType):
        self.dtype = dtype
        self.matrix = matrix

    def encode(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """Scaled embeddings."""
        x = self.matrix.take(tokens).astype(self.dtype)
        return x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)

    def decode(self, x: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """Logits in float32."""
        return _multiply(self.matrix, x, 1)


class QuantizedHead(nnx.Module):
    """Stands in for `Head`."""

    def __init__(self, matrix: Matrix):
        self.matrix = matrix

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        return _multiply(self.matrix, x, 1)


def quantize_layer(
    layer: nnx.Module, format: Format, moments: Float[Array, "I I"] | None = None
) -> nnx.Module:
    """What stands in for the layer; `layer` stays as it is.

    `moments` are those of its inputs, for projections of 4 bits; others do not look at them.
    """
    match layer:
        case Projection():
            w = layer.w[...]
            out_shape = w.shape[: w.ndim - layer.axes]
            w = w.reshape(math.prod(out_shape), -1)
            if moments is not None and isinstance(format, Int4):
                matrix = format.store(w, moments)
            else:
                matrix = format.store(w)
            return QuantizedProjection(matrix, out_shape, layer.axes, layer.dtype)
        case Dense():
            matrix = format.store(kernel_matrix(layer.kernel[...], layer.axes))
            return QuantizedDense(matrix, layer.bias, layer.axes, layer.dtype)
        case Embedder():
            return QuantizedEmbedder(format.store(layer.input_embedding[...]), layer.dtype)
        case Head():
            return QuantizedHead(format.store(layer.w[...]))
    raise TypeError(f"{type(layer).__name__} has no weight to quantize.")


def kernel_matrix(kernel: Float[Array, "..."], axes: int) -> Float[Array, "O I"]:
    """The kernel of a `Dense` with so many input axes, as a matrix."""
    return kernel.reshape(math.prod(kernel.shape[:axes]), -1).T


def _multiply(
    matrix: Matrix, x: Float[Array, "..."], axes: int, out_shape: tuple[int, ...] = (-1,)
) -> Float[Array, "..."]:
    """x [*rows, *in], summed over the `axes` axes of in: f32[*rows, *out_shape]."""
    rows = x.shape[: x.ndim - axes]
    y = frozen_product(matrix, x.reshape(math.prod(rows), -1))
    return y.reshape(*rows, *out_shape)


@dataclasses.dataclass(frozen=True)
class Axes:
    """Axes of one layer's weight, without the one that layers are stacked on.

    Attributes:
      inputs: those that are summed over, in ascending order.
      parts: names of the weights that are joined on the first axis; none if it is one weight.
    """

    inputs: tuple[int, ...]
    parts: tuple[str, ...] = ()

    @property
    def lead(self) -> int:
        """How many axes come before those of a single weight."""
        return 1 if self.parts else 0

    def outputs(self, ndim: int) -> tuple[int, ...]:
        """The axes that are neither inputs nor that of the parts, of so many."""
        return tuple(axis for axis in range(self.lead, ndim) if axis not in self.inputs)


EINSUM_AXES = {
    "attn/q_einsum": Axes((1,)),  # [N, W, H]
    "attn/kv_einsum": Axes((2,), ("k", "v")),  # [2, K, W, H]
    "attn/attn_vec_einsum": Axes((0, 1)),  # [N, H, W]
    "mlp/gating_einsum": Axes((1,), ("gate", "up")),  # [2, W, F]
    "mlp/linear": Axes((0,)),  # [F, W]
}


class QuantizedEinsum(nnx.Module):
    """Stands in for `Einsum`: its weight as a matrix [outputs, inputs]."""

    def __init__(self, matrix: Matrix, shape: tuple[int, ...], axes: Axes, dtype: DType):
        self.shape = shape  # of one layer's weight before
        self.axes = axes
        self.dtype = dtype
        self.matrix = matrix

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `Einsum`, for the equations that `axes` is right for."""
        operands, result = equation.split("->")
        of_x, of_w = operands.split(",")
        ins = "".join(of_w[axis] for axis in self.axes.inputs)
        outs = [axis for axis in range(len(of_w)) if axis not in self.axes.inputs]
        rows = "".join(letter for letter in of_x if letter not in ins)
        x = x.astype(self.dtype).transpose([of_x.index(letter) for letter in rows + ins])
        width = math.prod(x.shape[len(rows) :])
        y = frozen_product(self.matrix, x.reshape(-1, width))
        y = y.reshape(*x.shape[: len(rows)], *(self.shape[axis] for axis in outs))
        letters = rows + "".join(of_w[axis] for axis in outs)
        return y.transpose([letters.index(letter) for letter in result]).astype(self.dtype)


def quantize_stacked(model: PaliGemma, recipe: Recipe | str) -> PaliGemma:
    """The model with weights of few bits and its layers still stacked; `model` stays as it is.

    For `add_lora`: a frozen base that takes a quarter or a half of the memory. `recipe` as for
    `quantize`, `Int8Dynamic` apart, whose rounded rows let no gradient through. Raises ConfigError
    for a model that is unrolled, quantized, or has adapters.
    """
    formats = find_recipe(recipe)
    if any(isinstance(format, Int8Dynamic) for format in vars(formats).values()):
        raise ConfigError(
            "Int8Dynamic rounds what it multiplies, and no gradient passes through rounding. Int8, "
            "Int4 and Mixed of them fit. Call quantize_stacked(model, 'int8')."
        )
    problem = _unfit(model)
    if problem:
        raise ConfigError(
            f"{problem} A stacked model of floats, as load_model gives, fits. Call "
            "quantize_stacked(load_model(path), recipe)."
        )
    shared = nnx.merge(*nnx.split(model))
    text, image = shared.llm.layers, shared.img.blocks
    for name, axes in EINSUM_AXES.items():
        room, _, layer = name.partition("/")
        format = formats.attention if room == "attn" else formats.mlp
        _replace(getattr(text, room), layer, format, axes)
    for name in ("embedder", "lm_head"):
        _replace(shared.llm, name, formats.table)
    for room, names in (("attn", ("q", "k", "v", "out")), ("mlp", ("fc1", "fc2"))):
        for name in names:
            _replace(getattr(image, room), name, formats.image, stacked=True)
    _replace(shared.img, "head", formats.image)
    return shared


def _unfit(model: PaliGemma) -> str | None:
    layers = model.llm.layers
    if isinstance(layers, nnx.List):
        return "The layers of this model stand one by one."
    for name in EINSUM_AXES:
        room, _, layer = name.partition("/")
        found = getattr(getattr(layers, room), layer)
        if type(found) is not Einsum:
            return f"The weights of this model are held by {type(found).__name__} already."
    return None


def _replace(
    owner: object,
    name: str,
    format: Format | None,
    axes: Axes | None = None,
    stacked: bool = False,
) -> None:
    if format is None or not hasattr(owner, name):
        return
    layer = getattr(owner, name)
    if isinstance(layer, Einsum) and axes is not None:
        new: nnx.Module = _quantize_einsum(layer, format, axes)
    else:
        new = _quantize(layer, format, stacked and isinstance(layer, Dense))
    setattr(owner, name, new)


@functools.partial(jax.jit, static_argnames=("format", "axes"))
def _quantize_einsum(layer: Einsum, format: Format, axes: Axes) -> QuantizedEinsum:
    def one(w: jax.Array) -> QuantizedEinsum:
        outs = [axis for axis in range(w.ndim) if axis not in axes.inputs]
        columns = math.prod(w.shape[axis] for axis in axes.inputs)
        matrix = w.transpose(*outs, *axes.inputs).reshape(-1, columns)
        return QuantizedEinsum(format.store(matrix), w.shape, axes, layer.dtype)

    return jax.vmap(one)(layer.w[...])


@functools.partial(jax.jit, static_argnames=("format", "stacked"))
def _quantize(layer: nnx.Module, format: Format, stacked: bool) -> nnx.Module:
    def one(layer: nnx.Module) -> nnx.Module:
        return quantize_layer(layer, format)

    return jax.vmap(one)(layer) if stacked else one(layer)
