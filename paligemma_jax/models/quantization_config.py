"""What becomes of which weights: recipes for a whole model.

Formats of few bits that one matrix is stored in.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.quantized_matrix import (
    FLOAT8,
    DynamicMatrix,
    Matrix,
    Plain,
    QuantizedMatrix,
    fit_rows,
    fit_rows_to_inputs,
    layout_of_4_bits,
    round_rows,
)
from paligemma_jax.models.recipe_text import FITTING, KINDS, find_problems, read_recipe


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

    def format_of(self, path: str) -> Format | None:
        """The format of a parameter of the unrolled model, by its path."""
        match path.split("/"):
            case ["llm", "layers", _, "attn", *_]:
                return self.attention
            case ["llm", "layers", _, "mlp", *_]:
                return self.mlp
            case ["llm", "embedder" | "lm_head", _]:
                return self.table
            case ["img", "blocks", *_, "kernel"] | ["img", "head", "kernel"]:
                return self.image
        return None


Recipe = Int8 | Int8Dynamic | Int4 | Float8 | Mixed


def find_recipe(recipe: Recipe | str) -> Mixed:
    """The format of every kind of weight that a recipe, or its name, stands for.

    A single format is for the language model; 4 bits leave its table at 8. Names are those of
    formats, "mixed" (8 bits for attention, table and image encoder, 4 for the MLPs), or parts with
    their formats: "attention=int8,mlp=int4:128". Raises ConfigError for others.
    """
    if isinstance(recipe, str):
        try:
            return recipe_from_names(read_recipe(recipe))
        except ValueError as e:
            raise ConfigError(
                f"{str(e).capitalize()} to quantize by. {FITTING}, or an object: "
                "from_pretrained(path, quantize=Int4(group=64))"
            ) from e
    if isinstance(recipe, Mixed):
        return recipe
    table = Int8() if isinstance(recipe, Int4) else recipe
    return Mixed(attention=recipe, mlp=recipe, table=table)


def recipe_names(recipe: Mixed) -> dict[str, str | None]:
    """The format of each kind by its name, as `recipe_from_names` reads it."""
    return {kind: _name(getattr(recipe, kind)) for kind in KINDS}


def recipe_from_names(names: Mapping[str, str | None]) -> Mixed:
    """Inverse of `recipe_names`; raises ValueError that tells everything which is not known."""
    problems = find_problems(names)
    problems += [f"nothing is said of {kind}" for kind in KINDS if kind not in names]
    if problems:
        raise ValueError("; ".join(problems))
    return Mixed(**{kind: _format(name) for kind, name in names.items()})


def spell_recipe(recipe: Mixed) -> str:
    """For people, and for `find_recipe`: "attention=int4:64,mlp=int4:64,table=int8"."""
    names = recipe_names(recipe)
    return ",".join(f"{kind}={name}" for kind, name in names.items() if name is not None)


def _name(format: Format | None) -> str | None:
    match format:
        case None:
            return None
        case Int8():
            return "int8"
        case Int8Dynamic():
            return "int8-dynamic"
        case Float8():
            return "float8"
        case Int4(group=group):
            return f"int4:{group or 'row'}"
    raise ConfigError(
        f"{type(format).__name__} is a format without a name, by which files could tell it. Int8, "
        "Int8Dynamic, Int4 and Float8 fit. Quantize with one of them."
    )


def _format(name: str | None) -> Format | None:
    if name is None:
        return None
    kind, _, group = name.partition(":")
    if kind == "int4":
        return Int4(None if group == "row" else int(group or 64))
    return {"int8": Int8(), "int8-dynamic": Int8Dynamic(), "float8": Float8()}[kind]
