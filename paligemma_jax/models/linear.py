"""Linear layers: one weight, plain or quantized, perhaps with a LoRA adapter beside it.

Parameters keep their own dtype; layers compute in the activation dtype and accumulate in float32.
A weight is an array under its own name (`w`, `kernel`) or, quantized, a matrix [outputs, inputs]
under `matrix`. An adapter (arXiv 2106.09685) lies beside it, of rank R:

    lora_a      [*inputs, R]     [C, *inputs, R] where C weights are joined (k and v, gate and up)
    lora_b      [R, *outputs]    [C, R, *outputs]
    lora_scale  []               [C]; 0 where a part has no adapter; never trained

All have the leading axis of layers where layers are stacked.
"""

import dataclasses
import math
import string
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from paligemma_jax.models.layers import MATMUL, DType, contract, normal_init

_RANK = "r"  # in equations, whose other letters are capitals


@runtime_checkable
class Matrix(Protocol):
    """A quantized matrix [O, I]; see `quantized_matrix`."""

    values: nnx.Param
    scale: nnx.Param

    def matmul(self, x: Float[Array, "R I"]) -> Float[Array, "R O"]: ...

    def take(self, rows: Int[Array, "..."]) -> Float[Array, "... I"]: ...


@dataclasses.dataclass(frozen=True)
class EinsumAxes:
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
        """The axes, of so many, that are neither inputs nor that of the parts."""
        return tuple(axis for axis in range(self.lead, ndim) if axis not in self.inputs)


class DropoutKey(nnx.Variable):
    """A random key for every layer, there only while gradients are taken; see `with_dropout`."""


class Linear(nnx.Module):
    """What all linear layers share; `shape` and `axes` are of one layer's weight."""

    weight_name: ClassVar[str] = "w"
    matrix: Matrix | None = None
    lora_a: nnx.Param | None = None
    lora_b: nnx.Param
    lora_scale: nnx.Param
    spec: Any = None  # the LoRA that the adapter was made by
    dropout_key: DropoutKey | None = None
    shape: tuple[int, ...]
    axes: EinsumAxes
    dtype: DType

    def as_matrix(self) -> Float[Array, "O I"]:
        """The weight of one layer with outputs as rows and inputs as columns."""
        inputs = self.axes.inputs
        outputs = [axis for axis in range(len(self.shape)) if axis not in inputs]
        w = getattr(self, self.weight_name)[...].transpose(*outputs, *inputs)
        return w.reshape(math.prod(self.shape[axis] for axis in outputs), -1)

    def with_matrix(self, matrix: Matrix) -> "Linear":
        """The same layer with a quantized weight."""
        layer = nnx.merge(*nnx.split(self))
        delattr(layer, self.weight_name)
        layer.matrix = matrix
        return layer

    def with_adapter(self, spec: Any, a: jax.Array, b: jax.Array, scale: jax.Array) -> "Linear":
        """The same layer with an adapter; arrays are shared."""
        layer = nnx.merge(*nnx.split(self))
        layer.spec = spec
        layer.lora_a, layer.lora_b, layer.lora_scale = map(nnx.Param, (a, b, scale))
        return layer

    def _quantized_matmul(
        self, x: Float[Array, "..."], axes: int, out_shape: tuple[int, ...] = (-1,)
    ) -> Float[Array, "..."]:
        """x [*rows, *in], summed over the `axes` axes of in: f32[*rows, *out_shape]."""
        assert self.matrix is not None
        rows = x.shape[: x.ndim - axes]
        return self.matrix.matmul(x.reshape(math.prod(rows), -1)).reshape(*rows, *out_shape)

    def _adapted(self, y: jax.Array, x: jax.Array, into: str, out_of: str) -> jax.Array:
        """`y`, which the weight makes of `x`, plus what the adapter makes of it, if there is one.

        `into` is the equation of x and lora_a, and `out_of` that of their result and lora_b.
        """
        if self.lora_a is None:
            return y
        if self.dropout_key is not None and self.spec.dropout:
            keep = 1 - self.spec.dropout
            kept = jax.random.bernoulli(self.dropout_key[...], keep, x.shape)
            x = jnp.where(kept, x / keep, 0).astype(x.dtype)
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        scale = jax.lax.stop_gradient(self.lora_scale[...]).astype(jnp.float32)
        inner = jnp.einsum(into, x, a, preferred_element_type=jnp.float32) * scale[..., None]
        delta = jnp.einsum(out_of, inner.astype(x.dtype), b, preferred_element_type=jnp.float32)
        return (y.astype(jnp.float32) + delta).astype(y.dtype)


class Einsum(Linear):
    """One weight tensor contracted by an einsum equation."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: EinsumAxes,
        *,
        rngs: nnx.Rngs,
        dtype: DType,
        param_dtype: DType,
    ):
        self.shape, self.axes, self.dtype = shape, axes, dtype
        fan_in = math.prod(shape[axis] for axis in axes.inputs)
        self.w = nnx.Param(normal_init(rngs.params(), shape, fan_in, param_dtype))

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Contracts `x` with the weight; float32 accumulation, result in the activation dtype."""
        operands, result = equation.split("->")
        of_x, of_w = operands.split(",")
        x = x.astype(self.dtype)
        if self.matrix is not None:
            y = self._by_matrix(x, of_x, of_w, result)
        else:
            w, operand, own = self.w[...].astype(self.dtype), x, equation
            if result.startswith(of_w[0]):
                # Joined parts as a batch: or XLA copies the weight with its axes in another order.
                operand, own = jnp.broadcast_to(x, (w.shape[0], *x.shape)), of_w[0] + equation
            y = jnp.einsum(own, operand, w, preferred_element_type=jnp.float32)
            y = checkpoint_name(y.astype(self.dtype), MATMUL)
        if self.lora_a is None:
            return y
        ins = "".join(of_w[axis] for axis in self.axes.inputs)
        outs = "".join(of_w[axis] for axis in self.axes.outputs(len(of_w)))
        lead = of_w[: self.axes.lead]
        inner = "".join(letter for letter in of_x if letter not in ins) + lead + _RANK
        into, out_of = (
            f"{of_x},{lead}{ins}{_RANK}->{inner}",
            f"{inner},{lead}{_RANK}{outs}->{result}",
        )
        return self._adapted(y, x, into, out_of)

    def _by_matrix(self, x: jax.Array, of_x: str, of_w: str, result: str) -> jax.Array:
        ins = "".join(of_w[axis] for axis in self.axes.inputs)
        outs = [axis for axis in range(len(of_w)) if axis not in self.axes.inputs]
        rows = "".join(letter for letter in of_x if letter not in ins)
        x = x.transpose([of_x.index(letter) for letter in rows + ins])
        y = self._quantized_matmul(x, len(ins), tuple(self.shape[axis] for axis in outs))
        letters = rows + "".join(of_w[axis] for axis in outs)
        return y.transpose([letters.index(letter) for letter in result]).astype(self.dtype)


class Dense(Linear):
    """`x @ kernel + bias`, where kernel may have several input or output axes."""

    weight_name = "kernel"

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        dtype: DType,
        param_dtype: DType,
    ):
        self.shape, self.axes = in_shape + out_shape, EinsumAxes(tuple(range(len(in_shape))))
        self.dtype = dtype
        init = normal_init(rngs.params(), self.shape, math.prod(in_shape), param_dtype)
        self.kernel = nnx.Param(init)
        self.bias = nnx.Param(jnp.zeros(out_shape, param_dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        inputs, bias = len(self.axes.inputs), self.bias[...].astype(jnp.float32)
        x = x.astype(self.dtype)
        if self.matrix is not None:
            y = (self._quantized_matmul(x, inputs, bias.shape) + bias).astype(self.dtype)
        else:
            kernel = self.kernel[...].astype(self.dtype)
            y = jnp.tensordot(x, kernel, axes=inputs, preferred_element_type=jnp.float32)
            y = checkpoint_name((y + bias).astype(self.dtype), MATMUL)
        letters = string.ascii_uppercase
        ins, outs = letters[:inputs], letters[inputs : inputs + bias.ndim]
        into, out_of = f"...{ins},{ins}{_RANK}->...{_RANK}", f"...{_RANK},{_RANK}{outs}->...{outs}"
        return self._adapted(y, x, into, out_of)


class Projection(Linear):
    """One weight [*out, *in], contracted over its last axes, as it is stored for decoding."""

    def __init__(
        self, out_shape: tuple[int, ...], in_shape: tuple[int, ...], *, dtype: DType, w: DType
    ):
        self.shape, self.dtype = out_shape + in_shape, dtype
        self.axes = EinsumAxes(tuple(range(len(out_shape), len(self.shape))))
        self.w = nnx.Param(jnp.zeros(self.shape, w))

    def __call__(self, x: Float[Array, "B T *of_in"]) -> Float[Array, "B T *of_out"]:
        """Multiplied in the activation dtype, added up and given back in float32."""
        inputs = len(self.axes.inputs)
        if self.matrix is None:
            return contract(self.w[...], x.astype(self.dtype), inputs)
        return self._quantized_matmul(x.astype(self.dtype), inputs, self.shape[:-inputs])
