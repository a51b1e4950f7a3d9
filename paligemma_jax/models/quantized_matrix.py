"""Matrices of 8 or 4 bits a weight, multiplied as they are stored.

Nothing of a matrix' size is ever dequantized outside of a matmul.

Letters: O output channels, I inputs (contracted), R rows of activations, G groups of inputs with a
scale each (1: one scale for the whole output channel).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from paligemma_jax.models.layers import DType, contract, in_row_blocks, on_cpu
from paligemma_jax.models.linear import Matrix
from paligemma_jax.models.quantization_config import (
    Float8,
    Int4,
    Int8,
    Int8Dynamic,
    QuantizedFormat,
)

FLOAT8 = jnp.float8_e4m3fn
FEW_ROWS_ON_CPU = 16  # up to which float32 matmuls of a CPU are faster than those of bfloat16
# Scales that are tried, as fractions of the largest; twice as many lower the error by 1 % of it.
_SCALES = (1.0, 0.93, 0.86, 0.79, 0.7, 0.6)


def quantize_matrix(matrix: Float[Array, "O I"], format: QuantizedFormat) -> Matrix:
    """The quantized matrix."""
    match format:
        case Int8():
            values, scale = quantize_int8(matrix)
            return QuantizedMatrix(values, scale)
        case Int8Dynamic():
            return DynamicMatrix(*quantize_int8(matrix))
        case Float8():
            limit = float(jnp.finfo(FLOAT8).max)
            matrix = matrix.astype(jnp.float32)
            scale = jnp.max(jnp.abs(matrix), axis=1, keepdims=True) / limit
            scale = jnp.where(scale == 0, 1.0, scale)
            values = jnp.clip(matrix / scale, -limit, limit).astype(FLOAT8)  # beyond it are NaNs
            return QuantizedMatrix(values, scale)
        case Int4():
            groups = format.groups(matrix.shape[1])
            return int4_matrix(*quantize_int4(matrix, groups, scale_dtype(groups)))


def quantize_int8(matrix: Float[Array, "O I"]) -> tuple[Int[Array, "O I"], Float[Array, "O 1"]]:
    """Symmetric quantization to -127..127 with a scale for each row; that of zeros is 1."""
    matrix = matrix.astype(jnp.float32)
    scale = jnp.max(jnp.abs(matrix), axis=1, keepdims=True) / 127
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    return jnp.clip(jnp.round(matrix / scale), -127, 127).astype(jnp.int8), scale


def quantize_int4(
    matrix: Float[Array, "O I"], groups: int = 1, scale_dtype: DType = jnp.float32
) -> tuple[Int[Array, "O I"], Float[Array, "O G"]]:
    """Integers from -8 to 7 with the scales, of those tried, that leave the least squared error.

    The number of a group that is farthest from 0 becomes -8, which has no opposite: scales have the
    other sign. A smaller scale may cut off the largest numbers for smaller steps among the others.
    """
    grouped = matrix.astype(jnp.float32).reshape(matrix.shape[0], groups, -1)
    high, low = jnp.max(grouped, axis=2), jnp.min(grouped, axis=2)
    whole = jnp.where(high > -low, high, low) / -8
    whole = jnp.where(whole == 0, 1.0, whole)

    def steps(scale: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(grouped / scale.astype(jnp.float32)[:, :, None]), -8, 7)

    def better(
        best: tuple[jax.Array, jax.Array], fraction: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale = (whole * fraction).astype(scale_dtype)
        off = steps(scale) * scale.astype(jnp.float32)[:, :, None] - grouped
        error = jnp.sum(jnp.square(off), axis=2)
        closer = error < best[0]
        return (jnp.where(closer, error, best[0]), jnp.where(closer, scale, best[1])), None

    worst = (jnp.full(whole.shape, jnp.inf, jnp.float32), whole.astype(scale_dtype))
    (_, scale), _ = jax.lax.scan(better, worst, jnp.asarray(_SCALES, jnp.float32))
    return steps(scale).astype(jnp.int8).reshape(matrix.shape), scale


def scale_dtype(groups: int) -> DType:
    """Of 4-bit weights; scales of groups are many, and kept small."""
    return jnp.float32 if groups == 1 else jnp.bfloat16


def int4_matrix(values: Int[Array, "O I"], scale: Float[Array, "O G"]) -> "QuantizedMatrix":
    """Of integers -8..7, stored as this device multiplies them."""
    stored = int4_on_device(values, scale.shape[1])
    return QuantizedMatrix(stored, scale, bits=4, packed=stored.shape != values.shape)


def int4_on_device(values: Int[Array, "O I"], groups: int) -> Num[Array, "O stored"]:
    """Integers -8..7 as this device stores them: two in a byte."""
    return pack_int4(values, groups) if on_cpu() else values.astype(jnp.int4)


def pack_int4(values: Int[Array, "O I"], groups: int) -> Int[Array, "O stored"]:
    """Two integers -8..7 in each byte; a byte each where groups have an odd number of them.

    The first half of a group lies in the low bits, the second in the high ones. So files store
    them, and CPUs, where XLA would give each a byte of its own.
    """
    values = values.astype(jnp.int8)
    if values.shape[1] // groups % 2:
        return values
    low, high = _halves(values, groups)
    return (low & 15) | (high << 4)


def unpack_int4(stored: Int[Array, "O stored"], columns: int, groups: int) -> Int[Array, "O I"]:
    """Inverse of `pack_int4` for matrices of so many columns."""
    if stored.shape[1] == columns:
        return stored
    halves = [x.reshape(x.shape[0], groups, 1, -1) for x in _nibbles(stored)]
    return jnp.concatenate(halves, axis=2).reshape(stored.shape[0], -1)


def as_in_files(values: Num[Array, "O stored"], groups: int) -> Num[Array, "O in_files"]:
    """Values of a matrix as files store them, the same from every device."""
    return pack_int4(values, groups) if values.dtype == jnp.int4 else values


def int4_from_files(
    values: Int[Array, "O in_files"], columns: int, groups: int
) -> Num[Array, "O stored"]:
    """Inverse of `as_in_files` for 4-bit weights of so many columns."""
    return values if on_cpu() else unpack_int4(values, columns, groups).astype(jnp.int4)


def multiply_groups(values: Float[Array, "O I"], scale: Float[Array, "O G"]) -> Float[Array, "O I"]:
    """Each group of columns times its scale."""
    grouped = values.reshape(*scale.shape, -1)
    return (grouped * scale.astype(values.dtype)[:, :, None]).reshape(values.shape)


def is_quantized_array(array: Any) -> bool:
    """Whether an array, or what has a dtype, holds numbers of at most 8 bits."""
    return jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == FLOAT8


class QuantizedMatrix(nnx.Module):
    """Integers or 8-bit floats with a scale for each row or each group of inputs.

    With one scale a row, values are multiplied as they are, exactly in bfloat16 too, and the
    float32 sum is scaled. With groups they are scaled before the matmul, in the dtype of `x`: on
    CPUs a block of rows at a time, elsewhere inside of the matmul (see `Jitted`).
    """

    def __init__(
        self,
        values: Num[Array, "O stored"],
        scale: Float[Array, "O G"],
        *,
        bits: int = 8,
        packed: bool = False,
    ):
        self.bits = bits
        self.packed = packed  # two weights in a byte, see `pack_int4`
        self.values = nnx.Param(values)
        self.scale = nnx.Param(scale)

    def matmul(self, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
        """`x` times the transposed matrix, float32; its gradient is for `x` alone."""
        return _frozen_matmul(self, x)

    def take(self, rows: Int[Array, "..."]) -> Float[Array, "... I"]:
        """Some rows of the matrix, float32."""
        values = self._unpacked(self.values[...][rows.reshape(-1)])
        scale = self.scale[...][rows.reshape(-1)].astype(jnp.float32)
        return multiply_groups(values.astype(jnp.float32), scale).reshape(*rows.shape, -1)

    def forward(self, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
        """`matmul` without its rule for gradients."""
        values, scale = self.values[...], self.scale[...].astype(jnp.float32)
        grouped = scale.shape[1] > 1
        if on_cpu():
            y = self._forward_on_cpu(values, scale, x)
        elif not grouped:
            y = contract(self._unpacked(values), x)
        else:
            y = contract(multiply_groups(self._unpacked(values).astype(x.dtype), scale), x)
        return y if grouped else y * scale[:, 0]

    def _unpacked(self, values: jax.Array) -> jax.Array:
        groups = self.scale[...].shape[1]
        return unpack_int4(values, 2 * values.shape[1], groups) if self.packed else values

    def _forward_on_cpu(
        self, values: Num[Array, "O stored"], scale: Float[Array, "O G"], x: Float[Array, "R I"]
    ) -> Float[Array, "R O"]:
        rows, columns = x.shape
        dtype = jnp.float32 if rows <= FEW_ROWS_ON_CPU else x.dtype
        x = x.astype(dtype)
        inputs = _halves(x, scale.shape[1]) if self.packed else (x,)

        def block(values: jax.Array, scale: jax.Array) -> jax.Array:
            parts = [p.astype(dtype) for p in (_nibbles(values) if self.packed else (values,))]
            if scale.shape[1] > 1:
                parts = [multiply_groups(part, scale) for part in parts]
            return sum(
                (
                    jnp.einsum("oi,ri->or", part, x, preferred_element_type=jnp.float32)
                    for part, x in zip(parts, inputs, strict=True)
                ),
                jnp.zeros((), jnp.float32),
            )

        return in_row_blocks(block, values, scale, columns=columns).T


class DynamicMatrix(nnx.Module):
    """8 bits with a scale for each row; activations are quantized to 8 bits, too, row by row.

    Sums are exact integers. CPUs multiply integers in two thirds of the time that `QuantizedMatrix`
    takes; outputs differ more from those of the original weights.
    """

    def __init__(self, values: Int[Array, "O I"], scale: Float[Array, "O 1"]):
        self.values = nnx.Param(values)
        self.scale = nnx.Param(scale)

    def matmul(self, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
        """`x` times the transposed matrix, float32."""
        rows, steps = quantize_int8(x)
        y = _integer_matmul(self.values[...], rows).astype(jnp.float32)
        return y * steps * self.scale[...][:, 0]

    def take(self, rows: Int[Array, "..."]) -> Float[Array, "... I"]:
        """Some rows of the matrix, float32."""
        return self.values[...][rows].astype(jnp.float32) * self.scale[...][rows]


@jax.custom_vjp
def _frozen_matmul(matrix: QuantizedMatrix, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
    """`matrix.forward(x)`, whose gradient is for `x` alone.

    Left to itself, JAX would keep the dequantized weights until the gradient is taken: every layer
    in floats, at once. Here they are dequantized once more, one layer at a time.
    """
    return matrix.forward(x)


def _frozen_forward(
    matrix: QuantizedMatrix, x: jax.Array
) -> tuple[jax.Array, tuple[QuantizedMatrix, jax.Array]]:
    return matrix.forward(x), (matrix, x[:0])  # of `x` only the width and the dtype are needed


def _frozen_backward(
    kept: tuple[QuantizedMatrix, jax.Array], gradient: jax.Array
) -> tuple[Any, jax.Array]:
    matrix, none = kept
    rows = jnp.zeros((gradient.shape[0], none.shape[1]), none.dtype)
    _, pull_back = jax.vjp(matrix.forward, rows)
    return jax.tree.map(_zero, matrix), pull_back(gradient)[0]


def _zero(leaf: jax.Array) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)  # what JAX has for gradients of integers


_frozen_matmul.defvjp(_frozen_forward, _frozen_backward)


def _integer_matmul(w: Int[Array, "O I"], x: Int[Array, "R I"]) -> Int[Array, "R O"]:
    """In the order that is fast; see `contract`."""
    count = x.shape[0]
    if not on_cpu():
        return jnp.einsum("oi,ri->ro", w, x, preferred_element_type=jnp.int32)
    if count == 1:  # XLA has a fast matmul of integers for two rows at least
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    y = jnp.einsum("oi,ri->or", w, x, preferred_element_type=jnp.int32)
    return jax.lax.optimization_barrier(y).T[:count]


def _nibbles(stored: Int[Array, "O half"]) -> tuple[jax.Array, jax.Array]:
    return (stored << 4) >> 4, stored >> 4  # signed: the sign is carried along


def _halves(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """The columns that lie in low bits, and those in high ones."""
    grouped = x.reshape(x.shape[0], groups, 2, -1)
    return grouped[:, :, 0].reshape(x.shape[0], -1), grouped[:, :, 1].reshape(x.shape[0], -1)
