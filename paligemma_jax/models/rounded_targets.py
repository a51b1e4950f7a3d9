"""The parameters of an unrolled model that a recipe rounds, as matrices and back.

Letters: O output channels, I inputs, G groups of inputs with a scale each.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.formats import Format, Int4
from paligemma_jax.models.integers import Pairs, as_in_files, as_on_device, multiply_groups
from paligemma_jax.models.quantized_layers import kernel_matrix
from paligemma_jax.models.recipe import Mixed
from paligemma_jax.models.unrolled import Target, targets

_TWO_INPUT_AXES = ("attn/out/w", "attn/out/kernel")  # heads and their width
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RoundedTarget:
    """A parameter that every layer has, or one of no layer, and the format it is rounded to."""

    target: Target
    format: Format

    @property
    def owner(self) -> str:
        """The path of what holds it, without the layer's number: "llm/layers/attn/qkv"."""
        return f"{self.target.prefix}{self.target.name}".rpartition("/")[0]

    @property
    def values(self) -> str:
        """The path of the integers of all layers in a file."""
        return f"{self.owner}/matrix/values"

    @property
    def scale(self) -> str:
        """The path of their scales."""
        return f"{self.owner}/matrix/scale"

    @property
    def owners(self) -> list[str]:
        """As `owner`, of the unrolled model, layer by layer."""
        return [path.rpartition("/")[0] for path in self.target.paths]

    @property
    def shape(self) -> tuple[int, int]:
        """O and I."""
        whole, axes = self.target.shape, self.axes
        inputs = math.prod(whole[:axes] if self.is_kernel else whole[-axes:])
        return math.prod(whole) // inputs, inputs

    @property
    def is_kernel(self) -> bool:
        """Whether its first axes are inputs; otherwise its last ones are."""
        return self.target.name.endswith("kernel")

    @property
    def axes(self) -> int:
        """How many axes are inputs."""
        return 2 if self.target.name.endswith(_TWO_INPUT_AXES) else 1

    def round(self, w: Float[Array, "..."]) -> tuple[Array, Float[Array, "O G"]]:
        """Integers (or floats of 8 bits) as files have them, and scales.

        `w` is the parameter of a layer, or some rows of a table.
        """
        return _round(w, self.axes, self.is_kernel, self.format)

    def on_device(self, values: Array, scale: Float[Array, "O G"]) -> Array:
        """The values that `round` gives, as the model has them here."""
        if not isinstance(self.format, Int4):
            return values
        return _on_device(values, self.shape[1], scale.shape[1])

    def widen(self, values: Array, scale: Float[Array, "O G"], shape: Shape) -> Float[Array, "..."]:
        """What `round` was given, as far as it is still known; f32[shape]."""
        return _widen(values, scale, shape, self.is_kernel, isinstance(self.format, Int4))

    def file_shapes(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """What `round` gives of one layer."""
        return _file_shapes(self.format, self.shape)


def rounded_targets(config: PaliGemmaConfig, recipe: Mixed) -> list[RoundedTarget]:
    """All of a model's."""
    found = ((target, recipe.format_of(target.paths[0])) for target in targets(config))
    return [RoundedTarget(target, format) for target, format in found if format is not None]


@functools.lru_cache
def _file_shapes(
    format: Format, shape: tuple[int, int]
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    matrix = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda w: _round(w, 1, False, format), matrix)


@functools.partial(jax.jit, static_argnames=("axes", "is_kernel", "format"))
def _round(w: jax.Array, axes: int, is_kernel: bool, format: Format) -> tuple[jax.Array, jax.Array]:
    if is_kernel:
        matrix = format.store(kernel_matrix(w, axes))
    else:
        matrix = format.store(w.reshape(-1, math.prod(w.shape[w.ndim - axes :])))
    scale = matrix.scale[...]
    return as_in_files(matrix.values[...], scale.shape[1]), scale


@functools.partial(jax.jit, static_argnames=("columns", "groups"))
def _on_device(values: jax.Array, columns: int, groups: int) -> jax.Array:
    return as_on_device(values, columns, groups)


@functools.partial(jax.jit, static_argnames=("shape", "is_kernel", "is_int4"))
def _widen(
    values: Num[Array, "O stored"],
    scale: Float[Array, "O G"],
    shape: Shape,
    is_kernel: bool,
    is_int4: bool,
) -> jax.Array:
    columns = math.prod(shape) // values.shape[0]
    if is_int4 and values.shape[1] < columns:
        values = Pairs(scale.shape[1]).read(values)
    matrix = multiply_groups(values.astype(jnp.float32), scale)
    return matrix.T.reshape(shape) if is_kernel else matrix.reshape(shape)
