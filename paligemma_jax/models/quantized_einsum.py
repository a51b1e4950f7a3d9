"""Layers that stay stacked while their weights are of few bits: a base to train adapters on.

`quantize` makes the form for inference, layers one by one; `quantize_stacked` leaves them as
training wants them, under the same paths. The rounded weights themselves are never trained.
"""

import functools
import math

import jax
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.einsum_axes import EINSUM_AXES, Axes
from paligemma_jax.models.formats import Format, Int8Dynamic
from paligemma_jax.models.frozen_product import frozen_product
from paligemma_jax.models.layers import Dense, DType, Einsum
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantized_layers import quantize_layer
from paligemma_jax.models.quantized_matrix import Matrix
from paligemma_jax.models.recipe import Recipe, find_recipe


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
