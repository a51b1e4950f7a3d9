"""Layers with an adapter of low rank beside their weight: each stands in for one by its call.

The weight keeps its path, and the adapter's parameters lie beside it:

    lora_a      [*inputs, R]     [C, *inputs, R] where C weights are joined (k and v, gate and up)
    lora_b      [R, *outputs]    [C, R, *outputs]
    lora_scale  []               [C]; 0 where a part has no adapter; never trained

Parts have adapters of their own, so that they can be told apart again. All have the leading axis of
layers where layers are stacked. An adapter of a lower rank than its neighbours is filled up with
zeros, which training leaves zeros.

Letters: R rank.
"""

import string

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.models.einsum_axes import Axes
from paligemma_jax.models.layers import Dense, Einsum
from paligemma_jax.models.lora_spec import LoRA
from paligemma_jax.models.quantized_einsum import QuantizedEinsum
from paligemma_jax.models.quantized_layers import QuantizedDense

_RANK = "r"  # in equations, whose other letters are capitals


class DropoutKey(nnx.Variable):
    """A random key for every layer, there only while gradients are taken; see `with_dropout`."""


class Adapter(nnx.Module):
    """What all layers with an adapter have; `spec` is what they were made by."""

    lora_a: nnx.Param
    lora_b: nnx.Param
    lora_scale: nnx.Param
    spec: LoRA
    dropout_key: DropoutKey | None

    def _add(self, y: jax.Array, x: jax.Array, into: str, out_of: str) -> jax.Array:
        """`y`, the product with the weight, plus that of `x` with the adapter.

        `into` is the equation of x and lora_a, and `out_of` that of what comes out and lora_b.
        """
        x = self._drop(x.astype(y.dtype))
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        scale = jax.lax.stop_gradient(self.lora_scale[...]).astype(jnp.float32)
        inner = jnp.einsum(into, x, a, preferred_element_type=jnp.float32) * scale[..., None]
        delta = jnp.einsum(out_of, inner.astype(x.dtype), b, preferred_element_type=jnp.float32)
        return (y.astype(jnp.float32) + delta).astype(y.dtype)

    def _drop(self, x: jax.Array) -> jax.Array:
        if self.dropout_key is None or not self.spec.dropout:
            return x
        keep = 1 - self.spec.dropout
        kept = jax.random.bernoulli(self.dropout_key[...], keep, x.shape)
        return jnp.where(kept, x / keep, 0).astype(x.dtype)

    def _take(self, spec: LoRA, a: jax.Array, b: jax.Array, scale: jax.Array) -> None:
        self.lora_a, self.lora_b = nnx.Param(a), nnx.Param(b)
        self.lora_scale = nnx.Param(scale)
        self.spec = spec
        self.dropout_key = nnx.data(None)  # so that a key may come in its place


class LoRAEinsum(Adapter, Einsum):
    """Stands in for `Einsum`."""

    def __init__(
        self, base: Einsum, axes: Axes, spec: LoRA, a: jax.Array, b: jax.Array, scale: jax.Array
    ):
        self.axes = axes
        self.dtype = base.dtype
        self.w = base.w
        self._take(spec, a, b, scale)

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `Einsum`."""
        y = Einsum.__call__(self, equation, x)
        return self._add(y, x, *_equations(equation, self.axes))


class LoRAQuantizedEinsum(Adapter, QuantizedEinsum):
    """Stands in for `QuantizedEinsum`."""

    def __init__(
        self,
        base: QuantizedEinsum,
        axes: Axes,
        spec: LoRA,
        a: jax.Array,
        b: jax.Array,
        scale: jax.Array,
    ):
        QuantizedEinsum.__init__(self, base.matrix, base.shape, axes, base.dtype)
        self._take(spec, a, b, scale)

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `Einsum`."""
        y = QuantizedEinsum.__call__(self, equation, x)
        return self._add(y, x, *_equations(equation, self.axes))


class LoRADense(Adapter, Dense):
    """Stands in for `Dense`."""

    def __init__(self, base: Dense, spec: LoRA, a: jax.Array, b: jax.Array, scale: jax.Array):
        self.axes = base.axes
        self.dtype = base.dtype
        self.kernel, self.bias = base.kernel, base.bias
        self._take(spec, a, b, scale)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = Dense.__call__(self, x)
        return self._add(y, x, *_dense_equations(self.axes, self.bias[...].ndim))


class LoRAQuantizedDense(Adapter, QuantizedDense):
    """Stands in for `QuantizedDense`."""

    def __init__(
        self, base: QuantizedDense, spec: LoRA, a: jax.Array, b: jax.Array, scale: jax.Array
    ):
        QuantizedDense.__init__(self, base.matrix, base.bias, base.axes, base.dtype)
        self._take(spec, a, b, scale)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = QuantizedDense.__call__(self, x)
        return self._add(y, x, *_dense_equations(self.axes, self.bias[...].ndim))


def _equations(equation: str, axes: Axes) -> tuple[str, str]:
    """The two products with an adapter that do what `equation` does with a weight of `axes`."""
    operands, result = equation.split("->")
    of_x, of_w = operands.split(",")
    lead = of_w[: axes.lead]
    ins = "".join(of_w[axis] for axis in axes.inputs)
    outs = "".join(of_w[axis] for axis in axes.outputs(len(of_w)))
    rows = "".join(letter for letter in of_x if letter not in ins)
    inner = rows + lead + _RANK
    return f"{of_x},{lead}{ins}{_RANK}->{inner}", f"{inner},{lead}{_RANK}{outs}->{result}"


def _dense_equations(inputs: int, outputs: int) -> tuple[str, str]:
    letters = string.ascii_uppercase
    ins, outs = letters[:inputs], letters[inputs : inputs + outputs]
    return f"...{ins},{ins}{_RANK}->...{_RANK}", f"...{_RANK},{_RANK}{outs}->...{outs}"
