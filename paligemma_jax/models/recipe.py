"""What becomes of which weights: formats of one matrix, and recipes for a whole model."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.backend import on_cpu
from paligemma_jax.models.calibrated import fit_rows_to_inputs
from paligemma_jax.models.integers import Layout, Pairs, Plain, fit_rows, round_rows
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
        return QuantizedMatrix(values, scale, Plain(jnp.int8))


@dataclasses.dataclass(frozen=True)
class Int8Dynamic:
    """As `Int8`, but rows are rounded to 8 bits too, each by its largest number, as they come.

    On CPUs this is the fastest; answers differ more. See `DynamicMatrix`.
    """

    def store(self, matrix: Float[Array, "O I"]) -> DynamicMatrix:
        """See `Format`."""
        return DynamicMatrix(*round_rows(matrix, 8))


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

    def store(
        self, matrix: Float[Array, "O I"], moments: Float[Array, "I I"] | None = None
    ) -> QuantizedMatrix:
        """See `Format`; `moments` of the inputs make it `fit_rows_to_inputs`."""
        columns = matrix.shape[1]
        groups = 1 if self.group is None or columns % self.group else columns // self.group
        scale_dtype = jnp.float32 if groups == 1 else jnp.bfloat16
        if moments is None:
            values, scale = fit_rows(matrix, 4, groups, scale_dtype)
        else:
            values, scale = fit_rows_to_inputs(matrix, moments, 4, groups, scale_dtype)
        layout = _layout_of_4_bits(columns, groups)
        return QuantizedMatrix(layout.write(values), scale, layout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """A format for each kind of weight; None leaves it as it is.

    Attributes:
      attention, mlp: of the decoder's layers.
      table: token embeddings, which are read whole for every new token; the output head too where
        it is apart.
      image: image encoder and the projection after it, patch embedding left out.
    """

    attention: Format | None = Int8()
    mlp: Format | None = Int8()
    table: Format | None = Int8()
    image: Format | None = None


Recipe = Int8 | Int8Dynamic | Int4 | Mixed
_NAMES: dict[str, Recipe] = {"int8": Int8(), "int8-dynamic": Int8Dynamic(), "int4": Int4()}


def find_recipe(recipe: Recipe | str) -> Mixed:
    """The format of every kind of weight that a recipe, or its name, stands for.

    A single format is for the language model; 4 bits leave its table at 8. Raises ConfigError for
    unknown names.
    """
    if isinstance(recipe, str):
        if recipe not in _NAMES:
            raise ConfigError(
                f"There is no recipe {recipe!r} to quantize by. {', '.join(_NAMES)} fit, or an "
                "object: from_pretrained(path, quantize=Int4(group=64))"
            )
        recipe = _NAMES[recipe]
    if isinstance(recipe, Mixed):
        return recipe
    table = Int8() if isinstance(recipe, Int4) else recipe
    return Mixed(attention=recipe, mlp=recipe, table=table)


def _layout_of_4_bits(columns: int, groups: int) -> Layout:
    if not on_cpu():
        return Plain(jnp.int4)  # two a byte; XLA widens them inside of a product
    return Plain(jnp.int8) if columns // groups % 2 else Pairs(groups)
