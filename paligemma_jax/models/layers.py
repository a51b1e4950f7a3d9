"""The few layers everything is made of: Einsum, Dense, the two norms.

Parameters keep their own dtype; each layer computes in the activation dtype it is told, accumulates
products in float32, and takes norm statistics in float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.models.remat import product

DType = Any  # what numpy takes as a dtype
NORM_EPS = 1e-6


def normal_init(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: DType) -> jax.Array:
    """Truncated normal of variance 1/fan_in."""
    scale = 1 / math.sqrt(fan_in) / 0.87962566  # std of a unit normal cut at +-2
    return (jax.random.truncated_normal(key, -2.0, 2.0, shape) * scale).astype(dtype)


class Einsum(nnx.Module):
    """One weight tensor contracted by an einsum equation; what LoRA and quantisation replace."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        fan_in: int,
        rngs: nnx.Rngs,
        dtype: DType,
        param_dtype: DType,
    ):
        self.dtype = dtype
        self.w = nnx.Param(normal_init(rngs.params(), shape, fan_in, param_dtype))

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Contracts `x` with the weight; float32 accumulation, result in the activation dtype."""
        w, x = self.w[...].astype(self.dtype), x.astype(self.dtype)
        operands, result = equation.split("->")
        parts = operands.split(",")[1][0]
        if result.startswith(parts):
            # Joined parts as a batch: or XLA copies the weight with its axes in another order.
            x = jnp.broadcast_to(x, (w.shape[0], *x.shape))
            equation = parts + equation
        y = jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)
        return product(y.astype(self.dtype))


class Dense(nnx.Module):
    """`x @ kernel + bias`, where kernel may have several input or output axes."""

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        dtype: DType,
        param_dtype: DType,
    ):
        self.axes = len(in_shape)
        self.dtype = dtype
        fan_in = math.prod(in_shape)
        self.kernel = nnx.Param(
            normal_init(rngs.params(), in_shape + out_shape, fan_in, param_dtype)
        )
        self.bias = nnx.Param(jnp.zeros(out_shape, param_dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = jnp.tensordot(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            axes=self.axes,
            preferred_element_type=jnp.float32,
        )
        return product((y + self.bias[...].astype(jnp.float32)).astype(self.dtype))


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (arXiv 1607.06450), epsilon 1e-6."""

    def __init__(self, width: int, *, dtype: DType, param_dtype: DType):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        mean = jnp.mean(x, axis=-1, keepdims=True)
        # E[x^2] - E[x]^2 as the reference has it: any other rounding moves its logits by 1e-4.
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean)
        gain = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + NORM_EPS)
        x = (x - mean) * (gain * self.scale[...].astype(jnp.float32))
        return (x + self.bias[...].astype(jnp.float32)).astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root mean square normalisation (arXiv 1910.07467); the scale is applied as 1 + scale."""

    def __init__(self, width: int, *, dtype: DType, param_dtype: DType):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)
        return (x * (1.0 + self.scale[...].astype(jnp.float32))).astype(self.dtype)
