"""The layers whose weights may be of few bits: each stands in for one of the model's, by its call.

Letters: B batch, T tokens, W width, V vocabulary.
"""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from paligemma_jax.models.formats import Format, Int4
from paligemma_jax.models.frozen_product import frozen_product
from paligemma_jax.models.fused_block import Projection
from paligemma_jax.models.gemma import Embedder, Head
from paligemma_jax.models.layers import Dense, DType
from paligemma_jax.models.quantized_matrix import Matrix


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
