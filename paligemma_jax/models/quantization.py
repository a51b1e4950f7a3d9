"""Models whose weights are of few bits: `quantize`.

The parameters of an unrolled model that a recipe rounds, as matrices and back.

Letters: O output channels, I inputs, G groups of inputs with a scale each.

Which recipe the weights of a model are rounded by: `recipe_of`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.gptq import (
    InputMoments,
    Texts,
    measure_inputs,
    moment_bytes,
    weight_paths,
)
from paligemma_jax.models.inference_layout import Target, is_unrolled, targets, unroll
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization_config import (
    Float8,
    Format,
    Int4,
    Int8,
    Int8Dynamic,
    Mixed,
    Recipe,
    find_recipe,
    spell_recipe,
)
from paligemma_jax.models.quantized_layers import kernel_matrix, quantize_layer
from paligemma_jax.models.quantized_matrix import (
    FLOAT8,
    DynamicMatrix,
    Matrix,
    Pairs,
    QuantizedMatrix,
    as_in_files,
    as_on_device,
    is_rounded,
    multiply_groups,
)
from paligemma_jax.models.recipe_text import KINDS

CALIBRATION_BYTES = 4 << 30  # of what a decoder layer's weights are multiplied with, at once


def quantize(
    model: PaliGemma, recipe: Recipe | str, *, inputs: InputMoments | None = None
) -> PaliGemma:
    """The model with weights of few bits, in the layout for inference; `model` stays as it is.

    `recipe` is an `Int8`, `Int8Dynamic`, `Int4`, `Float8` or `Mixed`, or what `find_recipe` reads:
    "int8", "int4", "float8", "mixed", "mlp=int4:128,table=int8".
    Activations, norms and what the recipe leaves alone keep their dtypes, and their arrays are
    shared. `quantize_in_place` needs less memory, and `from_pretrained(..., quantize=)` least.
    With `inputs` (see `measure_inputs`) weights of 4 bits lose about half as much of what the model
    says. Raises ConfigError for a model that is quantized already.
    """
    shared = nnx.merge(*nnx.split(unroll(model)))
    quantize_in_place(shared, recipe, inputs=inputs)
    return shared


def quantize_in_place(
    model: PaliGemma, recipe: Recipe | str, *, inputs: InputMoments | None = None
) -> None:
    """`quantize` of an unrolled model (see `unroll`), one weight after the other.

    At most one more weight is held at a time, if nothing else refers to those of the model. Raises
    ConfigError for one that is stacked or quantized.
    """
    formats = _checked(model, recipe)
    for number in range(model.config.llm.depth):
        _quantize_block(model, number, formats, inputs or {})
    _quantize_rest(model, formats)


def calibrate_in_place(
    model: PaliGemma,
    recipe: Recipe | str,
    texts: Callable[[], Iterable[Texts]],
    *,
    memory: int = CALIBRATION_BYTES,
) -> None:
    """`quantize_in_place` by what weights of 4 bits are multiplied with in some texts.

    `texts()` is called once for each of the `calibration_rounds`: some layers at a time, of which
    the measures take at most `memory` bytes, each group after those before it were rounded. Raises
    ConfigError as `quantize_in_place`, and for a recipe without weights of 4 bits in the decoder.
    """
    formats = _checked(model, recipe)
    if not any(isinstance(format, Int4) for format in (formats.attention, formats.mlp)):
        raise ConfigError(
            f"Nothing of {spell_recipe(formats)} is rounded by what it is multiplied with. Weights "
            "of 4 bits of the decoder's layers are. Calibrate with: recipe='int4' (--recipe int4)"
        )
    for layers in calibration_rounds(model.config, memory):
        inputs = measure_inputs(model, texts(), layers=layers)
        for number in layers:
            _quantize_block(model, number, formats, inputs)
    _quantize_rest(model, formats)


def calibration_rounds(config: PaliGemmaConfig, memory: int = CALIBRATION_BYTES) -> list[range]:
    """The layers that `calibrate_in_place` measures together."""
    depth, size = config.llm.depth, max(1, memory // moment_bytes(config.llm))
    return [range(start, min(start + size, depth)) for start in range(0, depth, size)]


def _checked(model: PaliGemma, recipe: Recipe | str) -> Mixed:
    """The recipe, if the model is one that can be quantized."""
    if is_quantized(model):
        raise ConfigError(
            "The weights of this model are rounded to few bits already, and rounding them again "
            "would lose more. A model as it was trained fits. Load it once more without quantize=."
        )
    if not is_unrolled(model):
        raise ConfigError(
            "The layers of this model are stacked, as training wants them. Layers one by one fit. "
            "Call quantize_in_place(unroll(model), recipe), or quantize(model, recipe)."
        )
    return find_recipe(recipe)


def _quantize_block(model: PaliGemma, number: int, formats: Mixed, inputs: InputMoments) -> None:
    text = model.llm.layers
    assert isinstance(text, nnx.List)
    for path, (owner, name) in weight_paths(number).items():
        format = formats.attention if owner == "attn" else formats.mlp
        _replace(getattr(text[number], owner), (name,), format, inputs.get(path))


def _quantize_rest(model: PaliGemma, formats: Mixed) -> None:
    image = model.img.blocks
    assert isinstance(image, nnx.List)
    _replace(model.llm, ("embedder", "lm_head"), formats.table)
    for block in image:
        _replace(block.attn, ("q", "k", "v", "out"), formats.image)
        _replace(block.mlp, ("fc1", "fc2"), formats.image)
    _replace(model.img, ("head",), formats.image)


def abstract_quantized(model: PaliGemma, recipe: Recipe | str) -> PaliGemma:
    """The quantized model with shapes in place of arrays, from an unrolled one of shapes."""

    def run(model: PaliGemma) -> PaliGemma:
        quantize_in_place(model, recipe)
        return model

    return jax.eval_shape(run, model)


def is_quantized(model: nnx.Module) -> bool:
    """Whether any weight is of at most 8 bits."""
    return any(map(is_rounded, jax.tree.leaves(model)))


def _replace(
    owner: object,
    names: tuple[str, ...],
    format: Format | None,
    moments: jax.Array | None = None,
) -> None:
    for name in names:
        if format is not None and hasattr(owner, name):
            layer = _quantize(getattr(owner, name), format, moments)
            setattr(owner, name, jax.block_until_ready(layer))


@functools.partial(jax.jit, static_argnames="format")
def _quantize(layer: nnx.Module, format: Format, moments: jax.Array | None) -> nnx.Module:
    return quantize_layer(layer, format, moments)


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


def recipe_of(model: PaliGemma) -> Mixed | None:
    """The recipe that an unrolled model was quantized by; None for weights as they were trained.

    Raises ConfigError for a stacked model that is quantized, and for one of which parts of a kind
    are in different formats.
    """
    if not any(map(is_rounded, jax.tree.leaves(model))):
        return None
    if not is_unrolled(model):
        raise ConfigError(
            "The weights of this model are rounded while its layers are stacked, as the base of "
            "adapters. A model that from_pretrained or quantize gives fits. Save the adapters "
            "alone: save_adapter(model, path)"
        )
    return Mixed(**{kind: _format_of_kind(model, kind) for kind in KINDS})


def _format_of_kind(model: PaliGemma, kind: str) -> Format | None:
    recipe = Mixed(**{**dict.fromkeys(KINDS), kind: Int8()})
    found: set[Format | None] = set()
    matrices: list[tuple[Matrix, int]] = []
    for rounded in rounded_targets(model.config, recipe):
        for owner in rounded.owners:
            matrix = getattr(_at(model, owner), "matrix", None)
            found.add(None if matrix is None else _format(matrix, rounded.shape[1]))
            if matrix is not None:
                matrices.append((matrix, rounded.shape[1]))
    grouped = {f for f in found if isinstance(f, Int4) and f.group is not None}
    if len(grouped) == 1 and found <= grouped | {Int4(None)}:
        (format,) = grouped
        if all(matrix.scale[...].shape[1] == format.groups(n) for matrix, n in matrices):
            return format
    if len(found) != 1:
        names = ", ".join(sorted(map(str, found)))
        raise ConfigError(
            f"Weights of one kind ({kind}) are in several formats: {names}. One format for each "
            "kind fits. Quantize with a recipe: quantize(model, Mixed(...))"
        )
    return found.pop()


def _at(model: PaliGemma, path: str) -> nnx.Module:
    found = model
    for name in path.split("/"):
        found = found[int(name)] if isinstance(found, nnx.List) else getattr(found, name)
    return found


def _format(matrix: Matrix, columns: int) -> Format:
    match matrix:
        case DynamicMatrix():
            return Int8Dynamic()
        case QuantizedMatrix(layout=layout, values=values, scale=scale):
            if values[...].dtype == FLOAT8:
                return Float8()
            groups = scale[...].shape[1]
            if layout.bits == 8:
                return Int8()
            return Int4(None if groups == 1 else columns // groups)
    raise TypeError(f"{type(matrix).__name__} has no format.")
