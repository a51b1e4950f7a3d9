"""Matrices as integers of few bits with scales: rounding, and how the integers lie in memory.

Letters: O output channels, I inputs, R rows, G groups of inputs with a scale each; 1 for a row.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from paligemma_jax.models.backend import on_cpu
from paligemma_jax.models.layers import DType

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
