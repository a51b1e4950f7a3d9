"""Matrices of few bits that are multiplied as they are: nothing of their size is ever widened.

Letters: O output channels, I inputs (contracted), R rows, G groups of inputs with a scale each.

Matrices as integers of few bits with scales: rounding, and how the integers lie in memory.

Letters: O output channels, I inputs, R rows, G groups of inputs with a scale each; 1 for a row.

Rounding that makes up for itself, by what a matrix is multiplied with: GPTQ (arXiv 2210.17323).

Letters: O output channels, I inputs, G groups of inputs with a scale each, S inputs of a group.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float, Int, Num

from paligemma_jax.models.layers import DType, contract, in_row_blocks, on_cpu

FLOAT8 = jnp.float8_e4m3fn

# Twice as many lower the error by 1 % of it.
_SHARES = (1.0, 0.93, 0.86, 0.79, 0.7, 0.6)


def round_rows(
    matrix: Float[Array, "O I"], bits: int, groups: int = 1, scale_dtype: DType = jnp.float32
) -> tuple[Int[Array, "O I"], Float[Array, "O G"]]:
    """Symmetric rounding: i8[O, I] of at most 2 ** (bits - 1) - 1, and scales, about equal to it.

    What a row or group of nothing but zeros is multiplied with is 1.
    """
    limit = 2 ** (bits - 1) - 1
    grouped = matrix.astype(jnp.float32).reshape(matrix.shape[0], groups, -1)
    scale = (jnp.max(jnp.abs(grouped), axis=2) / limit).astype(scale_dtype)
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    steps = jnp.round(grouped / scale.astype(jnp.float32)[:, :, None])
    return jnp.clip(steps, -limit, limit).astype(jnp.int8).reshape(matrix.shape), scale


def fit_rows(
    matrix: Float[Array, "O I"], bits: int, groups: int = 1, scale_dtype: DType = jnp.float32
) -> tuple[Int[Array, "O I"], Float[Array, "O G"]]:
    """As `round_rows`, using all 2 ** bits integers, with the scales that leave the least error.

    The largest number of a row or group becomes the lowest integer, which has no opposite: scales
    have the other sign. Of `_SHARES` of such a scale the one whose squared errors add up to least
    is taken: it may cut off the largest numbers for smaller steps among the others.
    """
    lowest = -(2 ** (bits - 1))
    grouped = matrix.astype(jnp.float32).reshape(matrix.shape[0], groups, -1)
    high, low = jnp.max(grouped, axis=2), jnp.min(grouped, axis=2)
    whole = jnp.where(high > -low, high, low) / lowest
    whole = jnp.where(whole == 0, 1.0, whole)

    def rounded(scale: jax.Array) -> jax.Array:
        steps = jnp.round(grouped / scale.astype(jnp.float32)[:, :, None])
        return jnp.clip(steps, lowest, -lowest - 1)

    def better(
        best: tuple[jax.Array, jax.Array], share: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale = (whole * share).astype(scale_dtype)
        off = rounded(scale) * scale.astype(jnp.float32)[:, :, None] - grouped
        error = jnp.sum(jnp.square(off), axis=2)
        closer = error < best[0]
        return (jnp.where(closer, error, best[0]), jnp.where(closer, scale, best[1])), None

    worst = (jnp.full(whole.shape, jnp.inf, jnp.float32), whole.astype(scale_dtype))
    (_, scale), _ = jax.lax.scan(better, worst, jnp.asarray(_SHARES, jnp.float32))
    return rounded(scale).astype(jnp.int8).reshape(matrix.shape), scale


def multiply_groups(
    integers: Float[Array, "O I"], scale: Float[Array, "O G"]
) -> Float[Array, "O I"]:
    """Each group of columns times its scale."""
    grouped = integers.reshape(*scale.shape, -1)
    return (grouped * scale.astype(integers.dtype)[:, :, None]).reshape(integers.shape)


def is_rounded(array: Any) -> bool:
    """Whether an array, or what has a dtype, holds numbers of at most 8 bits."""
    return jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == FLOAT8


@runtime_checkable
class Layout(Protocol):
    """How integers [O, I] lie in memory."""

    @property
    def bits(self) -> int:
        """Of one integer, whatever it takes there."""
        ...

    def write(self, integers: Num[Array, "O I"]) -> Num[Array, "O stored"]:
        """As they lie there."""
        ...

    def read(self, stored: Num[Array, "O stored"]) -> Num[Array, "O I"]:
        """Inverse of `write`."""
        ...

    def parts(self, stored: Num[Array, "O stored"]) -> tuple[Num[Array, "O part"], ...]:
        """Columns, in an order that costs nothing: that of `parts_of_rows`."""
        ...

    def parts_of_rows(self, x: Float[Array, "R I"]) -> tuple[Float[Array, "R part"], ...]:
        """What the columns of `parts` are multiplied with."""
        ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """One after the other, in the dtype that is for them, which may be one of floats."""

    dtype: DType
    bits: int = 8

    def write(self, integers: Num[Array, "O I"]) -> Num[Array, "O I"]:
        """See `Layout`."""
        return integers.astype(self.dtype)

    def read(self, stored: Num[Array, "O I"]) -> Num[Array, "O I"]:
        """See `Layout`."""
        return stored

    def parts(self, stored: Num[Array, "O I"]) -> tuple[Num[Array, "O I"], ...]:
        """See `Layout`."""
        return (stored,)

    def parts_of_rows(self, x: Float[Array, "R I"]) -> tuple[Float[Array, "R I"], ...]:
        """See `Layout`."""
        return (x,)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Two of 4 bits in each byte, for CPUs: XLA gives each a byte of its own there.

    The first half of a group lies in the low bits, the second in the high ones.
    """

    groups: int

    @property
    def bits(self) -> int:
        """See `Layout`."""
        return 4

    def write(self, integers: Int[Array, "O I"]) -> Int[Array, "O half"]:
        """See `Layout`."""
        low, high = self._halves(integers.astype(jnp.int8))
        return (low & 15) | (high << 4)

    def read(self, stored: Int[Array, "O half"]) -> Int[Array, "O I"]:
        """See `Layout`."""
        halves = [x.reshape(x.shape[0], self.groups, 1, -1) for x in self.parts(stored)]
        return jnp.concatenate(halves, axis=2).reshape(stored.shape[0], -1)

    def parts(self, stored: Int[Array, "O half"]) -> tuple[Int[Array, "O half"], ...]:
        """See `Layout`."""
        return (stored << 4) >> 4, stored >> 4  # signed: the sign is carried along

    def parts_of_rows(self, x: Float[Array, "R I"]) -> tuple[Float[Array, "R half"], ...]:
        """See `Layout`."""
        return self._halves(x)

    def _halves(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        grouped = x.reshape(x.shape[0], self.groups, 2, -1)
        return grouped[:, :, 0].reshape(x.shape[0], -1), grouped[:, :, 1].reshape(x.shape[0], -1)


def layout_of_4_bits(columns: int, groups: int) -> Layout:
    """That of so many columns on this device."""
    if not on_cpu():
        return Plain(jnp.int4, 4)  # two a byte; XLA widens them inside of a product
    return _bytes_of_4_bits(columns, groups)


def as_in_files(values: Num[Array, "O stored"], groups: int) -> Num[Array, "O in_files"]:
    """Integers of a matrix as files have them, the same from every device."""
    if values.dtype != jnp.int4:
        return values
    return _bytes_of_4_bits(values.shape[1], groups).write(values)


def as_on_device(
    values: Int[Array, "O in_files"], columns: int, groups: int
) -> Int[Array, "O stored"]:
    """Inverse of `as_in_files` for integers of 4 bits, so many in a row."""
    layout = layout_of_4_bits(columns, groups)
    in_files = _bytes_of_4_bits(columns, groups)
    return values if layout == in_files else layout.write(in_files.read(values))


def _bytes_of_4_bits(columns: int, groups: int) -> Layout:
    return Plain(jnp.int8, 4) if columns // groups % 2 else Pairs(groups)


# Rows up to which float32 products of a CPU are faster than those of bfloat16.
FEW_ROWS_ON_CPU = 16


@runtime_checkable
class Matrix(Protocol):
    """A matrix [O, I], however it is stored."""

    values: nnx.Param
    scale: nnx.Param

    def product(self, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
        """`x` times the transposed matrix, float32."""
        ...

    def take(self, rows: Int[Array, "..."]) -> Float[Array, "... I"]:
        """Some of its rows, float32."""
        ...


class QuantizedMatrix(nnx.Module):
    """Integers with a scale for each row, or each group of inputs; only the weights are rounded.

    Floats of 8 bits may stand for the integers. With one scale a row, these are multiplied as they
    are, exactly in bfloat16 too, and the float32 sum is scaled. With groups they are scaled before
    the product, in the rows' dtype: on CPUs a block of rows at a time, elsewhere inside of the
    product (see `Jitted`).
    """

    def __init__(self, values: Num[Array, "O stored"], scale: Float[Array, "O G"], layout: Layout):
        self.layout = layout
        self.values = nnx.Param(values)
        self.scale = nnx.Param(scale)

    def product(self, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
        """See `Matrix`."""
        values, scale = self.values[...], self.scale[...].astype(jnp.float32)
        grouped = scale.shape[1] > 1
        if on_cpu():
            y = self._product_on_cpu(values, scale, x)
        elif not grouped:
            y = contract(self.layout.read(values), x)
        else:
            y = contract(multiply_groups(self.layout.read(values).astype(x.dtype), scale), x)
        return y if grouped else y * scale[:, 0]

    def take(self, rows: Int[Array, "..."]) -> Float[Array, "... I"]:
        """See `Matrix`."""
        values = self.values[...][rows.reshape(-1)]
        scale = self.scale[...][rows.reshape(-1)].astype(jnp.float32)
        found = multiply_groups(self.layout.read(values).astype(jnp.float32), scale)
        return found.reshape(*rows.shape, -1)

    def _product_on_cpu(
        self, values: Num[Array, "O stored"], scale: Float[Array, "O G"], x: Float[Array, "R I"]
    ) -> Float[Array, "R O"]:
        rows, columns = x.shape
        dtype = jnp.float32 if rows <= FEW_ROWS_ON_CPU else x.dtype
        inputs = self.layout.parts_of_rows(x.astype(dtype))

        def block(values: jax.Array, scale: jax.Array) -> jax.Array:
            parts = [part.astype(dtype) for part in self.layout.parts(values)]
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
    """8 bits with a scale for each row, multiplied by rows that are rounded to 8 bits themselves.

    Sums are exact integers, and rows are rounded anew each time by their largest number. CPUs
    multiply integers in two thirds of the time that `QuantizedMatrix` takes; answers differ more
    from those of the weights before rounding.
    """

    def __init__(self, values: Int[Array, "O I"], scale: Float[Array, "O G"]):
        self.values = nnx.Param(values)
        self.scale = nnx.Param(scale)

    def product(self, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
        """See `Matrix`."""
        rows, steps = round_rows(x, 8)
        y = _integer_product(self.values[...], rows).astype(jnp.float32)
        return y * steps * self.scale[...][:, 0]

    def take(self, rows: Int[Array, "..."]) -> Float[Array, "... I"]:
        """See `Matrix`."""
        return self.values[...][rows].astype(jnp.float32) * self.scale[...][rows]


def _integer_product(w: Int[Array, "O I"], x: Int[Array, "R I"]) -> Int[Array, "R O"]:
    """In the order that is fast; see `contraction`."""
    count = x.shape[0]
    if not on_cpu():
        return jnp.einsum("oi,ri->ro", w, x, preferred_element_type=jnp.int32)
    if count == 1:  # XLA has a fast product of integers for two rows at least
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    y = jnp.einsum("oi,ri->or", w, x, preferred_element_type=jnp.int32)
    return jax.lax.optimization_barrier(y).T[:count]


_DAMPING = 0.01  # of the mean second moment: inputs that never vary would divide by 0


def fit_rows_to_inputs(
    matrix: Float[Array, "O I"],
    moments: Float[Array, "I I"],
    bits: int,
    groups: int = 1,
    scale_dtype: DType = jnp.float32,
) -> tuple[Int[Array, "O I"], Float[Array, "O G"]]:
    """As `fit_rows`, with less error of the product instead of the matrix.

    `moments` are sums of x_i x_j over the inputs x it will see. Inputs are rounded one after the
    other, and what one loses is given to those that are left, as far as they vary with it.
    """
    lowest = -(2 ** (bits - 1))
    inputs = matrix.shape[1]
    size = inputs // groups
    upper = _factor(moments)

    def round_group(
        left: Float[Array, "O I"], start: Int[Array, ""]
    ) -> tuple[Float[Array, "O I"], tuple[Int[Array, "O S"], Float[Array, "O"]]]:  # noqa: F821
        columns = jax.lax.dynamic_slice_in_dim(left, start, size, axis=1)
        below = jax.lax.dynamic_slice_in_dim(upper, start, size)
        among = jax.lax.dynamic_slice_in_dim(below, start, size, axis=1)
        scale = fit_rows(columns, bits, 1, scale_dtype)[1][:, 0]
        step = scale.astype(jnp.float32)

        def round_column(
            j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            columns, integers, lost = carry
            column = columns[:, j]
            rounded = jnp.clip(jnp.round(column / step), lowest, -lowest - 1)
            loss = (column - rounded * step) / among[j, j]
            columns = columns - loss[:, None] * among[j][None]  # 0 for those that are done
            return columns, integers.at[:, j].set(rounded), lost.at[:, j].set(loss)

        zeros = jnp.zeros_like(columns)
        _, integers, lost = jax.lax.fori_loop(0, size, round_column, (columns, zeros, zeros))
        return left - lost @ below, (integers.astype(jnp.int8), scale)

    starts = jnp.arange(0, inputs, size)
    _, (integers, scale) = jax.lax.scan(round_group, matrix.astype(jnp.float32), starts)
    return integers.transpose(1, 0, 2).reshape(matrix.shape), scale.T


def _factor(moments: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """Upper triangular U with U^T U the inverse of the damped moments."""
    size = moments.shape[0]
    mean = jnp.trace(moments) / size
    unit = jnp.where(mean > 0, mean, 1.0)  # or small moments would vanish in float32
    damped = moments.astype(jnp.float32) / unit + _DAMPING * jnp.eye(size)
    inverse = cho_solve((jnp.linalg.cholesky(damped), True), jnp.eye(size))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T
