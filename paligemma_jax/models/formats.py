"""Formats of few bits that one matrix is stored in."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.calibrated import fit_rows_to_inputs
from paligemma_jax.models.integers import FLOAT8, Plain, fit_rows, layout_of_4_bits, round_rows
from paligemma_jax.models.quantized_matrix import DynamicMatrix, Matrix, QuantizedMatrix


@runtime_checkable
class Format(Protocol):
    """How one matrix is stored in few bits."""

    def store(self, matrix: Float[Array, "O I"]) -> Matrix:
        """The matrix in this format; scales are for its rows, or parts of them."""
        ...


@dataclasses.dataclass(frozen=True)
class Int8:
    """8 bits a weight and a scale for each output channel; rows are multiplied as they are."""

    def store(self, matrix: Float[Array, "O I"]) -> QuantizedMatrix:
        """See `Format`."""
        values, scale = round_rows(matrix, 8)
        return QuantizedMatrix(values, scale, Plain(jnp.int8, 8))


@dataclasses.dataclass(frozen=True)
class Int8Dynamic:
    """As `Int8`, but rows are rounded to 8 bits too, each by its largest number, as they come.

    On CPUs this is the fastest; answers differ more. See `DynamicMatrix`.
    """

    def store(self, matrix: Float[Array, "O I"]) -> DynamicMatrix:
        """See `Format`."""
        return DynamicMatrix(*round_rows(matrix, 8))


@dataclasses.dataclass(frozen=True)
class Float8:
    """8 bits a weight as a float (e4m3) and a scale for each output channel.

    For devices that have such numbers; a CPU is correct and slow. Small weights keep more of their
    digits than in `Int8`, large ones fewer.
    """

    def store(self, matrix: Float[Array, "O I"]) -> QuantizedMatrix:
        """See `Format`."""
        limit = float(jnp.finfo(FLOAT8).max)
        matrix = matrix.astype(jnp.float32)
        scale = jnp.max(jnp.abs(matrix), axis=1, keepdims=True) / limit
        scale = jnp.where(scale == 0, 1.0, scale)
        values = jnp.clip(matrix / scale, -limit, limit).astype(FLOAT8)  # beyond it are NaNs
        return QuantizedMatrix(values, scale, Plain(FLOAT8, 8))


@dataclasses.dataclass(frozen=True)
class Int4:
    """4 bits a weight, with a scale for each `group` of inputs of each output channel.

    A scale for the whole output channel where `group` is None, or where groups do not come out
    even. Scales of groups are bfloat16: 4.25 bits a weight in groups of 64. Those
    of 128 take 4.125, but XLA for GPUs cannot always apply them inside of a product: not where it
    splits matrices of PaliGemma 2.
    """

    group: int | None = 64

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 2:
            raise ConfigError(
                f"Groups of {self.group} inputs cannot share a scale. 2 or more fit, or None for "
                "one scale a channel: Int4(group=64)"
            )

    def groups(self, columns: int) -> int:
        """Scales of a row of so many inputs."""
        return 1 if self.group is None or columns % self.group else columns // self.group

    def store(
        self, matrix: Float[Array, "O I"], moments: Float[Array, "I I"] | None = None
    ) -> QuantizedMatrix:
        """See `Format`; `moments` of the inputs make it `fit_rows_to_inputs`."""
        columns = matrix.shape[1]
        groups = self.groups(columns)
        scale_dtype = jnp.float32 if groups == 1 else jnp.bfloat16
        if moments is None:
            values, scale = fit_rows(matrix, 4, groups, scale_dtype)
        else:
            values, scale = fit_rows_to_inputs(matrix, moments, 4, groups, scale_dtype)
        layout = layout_of_4_bits(columns, groups)
        return QuantizedMatrix(layout.write(values), scale, layout)
