"""Quantized models: `quantize` for inference, `quantize_stacked` as the base of adapters.

Also the parameters of an unstacked model that a config quantizes, as matrices and back.

Letters: O output channels, I inputs, G groups of inputs with a scale each.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.gptq import (
    InputMoments,
    Texts,
    gptq_matrix,
    measure_inputs,
    moment_bytes,
)
from paligemma_jax.models.inference_layout import (
    UnstackedParam,
    is_unstacked,
    unstack_layers,
    unstacked_params,
)
from paligemma_jax.models.linear import Linear, Matrix
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization_config import (
    KINDS,
    Float8,
    Int4,
    Int8,
    Int8Dynamic,
    Quantization,
    QuantizationConfig,
    QuantizedFormat,
)
from paligemma_jax.models.quantized_matrix import (
    FLOAT8,
    DynamicMatrix,
    QuantizedMatrix,
    as_in_files,
    int4_from_files,
    is_quantized_array,
    multiply_groups,
    quantize_matrix,
    unpack_int4,
)

CALIBRATION_BYTES = 4 << 30  # of second moments of the inputs of decoder layers, at once


def quantize(
    model: PaliGemma, quantization: Quantization | str, *, inputs: InputMoments | None = None
) -> PaliGemma:
    """The model with quantized weights, in the layout for inference; `model` stays as it is.

    `quantization` is an `Int8`, `Int8Dynamic`, `Int4`, `Float8` or `QuantizationConfig`, or text:
    "int8", "int4", "float8", "mixed", "mlp=int4:128,embedding=int8". Activations, norms and weights
    that it leaves alone keep their dtypes, and their arrays are shared. `quantize_in_place` needs
    less memory, and `from_pretrained(..., quantize=)` least. With `inputs` (see `measure_inputs`)
    4-bit weights lose about half as much accuracy. Raises ConfigError for a model that is quantized
    already.
    """
    shared = nnx.merge(*nnx.split(unstack_layers(model)))
    quantize_in_place(shared, quantization, inputs=inputs)
    return shared


def quantize_in_place(
    model: PaliGemma, quantization: Quantization | str, *, inputs: InputMoments | None = None
) -> None:
    """`quantize` of an unstacked model (see `unstack_layers`), one weight after the other.

    At most one more weight is held at a time, if nothing else refers to those of the model. Raises
    ConfigError for one that is stacked or quantized.
    """
    config = _checked(model, quantization)
    for layer in _layers(model, config):
        layer.quantize((inputs or {}).get(layer.path))


def calibrate_in_place(
    model: PaliGemma,
    quantization: Quantization | str,
    texts: Callable[[], Iterable[Texts]],
    *,
    memory: int = CALIBRATION_BYTES,
) -> None:
    """`quantize_in_place` by what 4-bit weights are multiplied with in some texts (GPTQ).

    `texts()` is called once for each of the `calibration_rounds`: some layers at a time, whose
    second moments take at most `memory` bytes, each group after those before it were quantized.
    Raises ConfigError as `quantize_in_place`, and for a config without 4-bit decoder layers.
    """
    config = _checked(model, quantization)
    if not any(isinstance(format, Int4) for format in (config.attention, config.mlp)):
        raise ConfigError(
            f"Only 4-bit weights of decoder layers are calibrated; {config} has none. Pass 'int4' "
            "(--quantization int4)."
        )
    layers = list(_layers(model, config))
    for numbers in calibration_rounds(model.config, memory):
        inputs = measure_inputs(model, texts(), layers=numbers)
        prefixes = tuple(f"llm/layers/{number}/" for number in numbers)
        for layer in layers:
            if layer.path.startswith(prefixes):
                layer.quantize(inputs.get(layer.path))
    for layer in layers:
        if not layer.path.startswith("llm/layers/"):
            layer.quantize()


def calibration_rounds(config: PaliGemmaConfig, memory: int = CALIBRATION_BYTES) -> list[range]:
    """The layers that `calibrate_in_place` measures together."""
    depth, size = config.llm.depth, max(1, memory // moment_bytes(config.llm))
    return [range(start, min(start + size, depth)) for start in range(0, depth, size)]


def quantize_stacked(model: PaliGemma, quantization: Quantization | str) -> PaliGemma:
    """The model with quantized weights and its layers still stacked; `model` stays as it is.

    For `add_lora`: a frozen base that takes a quarter or a half of the memory, under the same
    paths. `quantization` as for `quantize`, `Int8Dynamic` apart, whose quantized activations let no
    gradient through. Raises ConfigError for a model that is unstacked, quantized, or has adapters.
    """
    config = QuantizationConfig.of(quantization)
    if any(isinstance(getattr(config, kind), Int8Dynamic) for kind in KINDS):
        raise ConfigError(
            "Int8Dynamic quantizes activations, and no gradient passes through rounding. Call "
            "quantize_stacked(model, 'int8')."
        )
    adapted = any(layer.lora_a is not None for layer in _linear_layers(model))
    if is_unstacked(model) or is_quantized(model) or adapted:
        state = "unstacked" if is_unstacked(model) else "quantized already"
        raise ConfigError(
            "Expected a stacked model of floats without adapters, got one that "
            f"{'has adapters' if adapted else f'is {state}'}. Call "
            "quantize_stacked(load_model(path), quantization)."
        )
    shared = nnx.merge(*nnx.split(model))
    for layer in _layers(shared, config):
        layer.quantize()
    return shared


def abstract_quantized(model: PaliGemma, quantization: Quantization | str) -> PaliGemma:
    """The quantized model with shapes in place of arrays, from an unstacked one of shapes."""

    def run(model: PaliGemma) -> PaliGemma:
        quantize_in_place(model, quantization)
        return model

    return jax.eval_shape(run, model)


def is_quantized(model: nnx.Module) -> bool:
    """Whether any weight is of at most 8 bits."""
    return any(map(is_quantized_array, jax.tree.leaves(model)))


def _checked(model: PaliGemma, quantization: Quantization | str) -> QuantizationConfig:
    """The config, if the model is one that can be quantized."""
    if is_quantized(model):
        raise ConfigError(
            "The weights of this model are quantized already, and quantizing them again would lose "
            "more. Load it once more without quantize=."
        )
    if not is_unstacked(model):
        raise ConfigError(
            "Expected layers one by one, got stacked ones. Call "
            "quantize_in_place(unstack_layers(model), quantization), or quantize(model, ...)."
        )
    return QuantizationConfig.of(quantization)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A linear layer to quantize: attribute `name` of `owner`, at `path` of the model."""

    owner: object
    name: str
    path: str
    format: QuantizedFormat
    stacked: bool

    def quantize(self, moments: jax.Array | None = None) -> None:
        layer = _quantize(getattr(self.owner, self.name), self.format, self.stacked, moments)
        setattr(self.owner, self.name, jax.block_until_ready(layer))


def _layers(model: PaliGemma, config: QuantizationConfig) -> Iterator[_Layer]:
    """Those that `config` has a format for, layer by layer."""
    owners: list[tuple[str, Any, bool]] = [("llm", model.llm, False), ("img", model.img, False)]
    for prefix, blocks in (("llm/layers", model.llm.layers), ("img/blocks", model.img.blocks)):
        if isinstance(blocks, nnx.List):
            parts = [(f"{prefix}/{number}", block) for number, block in enumerate(blocks)]
        else:
            parts = [(prefix, blocks)]
        for path, block in parts:
            stacked = path == prefix
            owners += [(f"{path}/attn", block.attn, stacked), (f"{path}/mlp", block.mlp, stacked)]
    for prefix, owner, stacked in owners:
        for name in list(vars(owner)):
            # No variable holds the layer: its weight is freed as soon as it is replaced.
            if isinstance(getattr(owner, name), Linear):
                path = f"{prefix}/{name}"
                format = config.format_of(f"{path}/{getattr(owner, name).weight_name}")
                if format is not None:
                    yield _Layer(owner, name, path, format, stacked)


def _linear_layers(model: PaliGemma) -> Iterator[Linear]:
    return (layer for _, layer in nnx.iter_modules(model) if isinstance(layer, Linear))


@functools.partial(jax.jit, static_argnames=("format", "stacked"))
def _quantize(
    layer: Linear, format: QuantizedFormat, stacked: bool, moments: Float[Array, "I I"] | None
) -> Linear:
    def one(layer: Linear) -> Linear:
        if moments is not None and isinstance(format, Int4):
            return layer.with_matrix(gptq_matrix(layer.as_matrix(), moments, format))
        return layer.with_matrix(quantize_matrix(layer.as_matrix(), format))

    return jax.vmap(one)(layer) if stacked else one(layer)


_TWO_INPUT_AXES = ("attn/out/w", "attn/out/kernel")  # heads and their width
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class QuantizedParam:
    """A parameter that every layer has, or one of no layer, and the format it is quantized to."""

    target: UnstackedParam
    format: QuantizedFormat

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
        """As `owner`, of the unstacked model, layer by layer."""
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

    def quantize(self, w: Float[Array, "..."]) -> tuple[Array, Float[Array, "O G"]]:
        """Integers (or floats of 8 bits) as files have them, and scales.

        `w` is the parameter of a layer, or some rows of an embedding table.
        """
        return _to_files(w, self.axes, self.is_kernel, self.format)

    def on_device(self, values: Array, scale: Float[Array, "O G"]) -> Array:
        """The values that `quantize` gives, as the model has them here."""
        if not isinstance(self.format, Int4):
            return values
        return _on_device(values, self.shape[1], scale.shape[1])

    def dequantize(
        self, values: Array, scale: Float[Array, "O G"], shape: Shape
    ) -> Float[Array, "..."]:
        """What `quantize` was given, as far as it is still known; f32[shape]."""
        return _dequantize(values, scale, shape, self.is_kernel, isinstance(self.format, Int4))

    def file_shapes(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """What `quantize` gives of one layer."""
        return _file_shapes(self.format, self.shape)


def quantized_params(
    config: PaliGemmaConfig, quantization: QuantizationConfig
) -> list[QuantizedParam]:
    """All of a model's."""
    found = ((p, quantization.format_of(p.paths[0])) for p in unstacked_params(config))
    return [QuantizedParam(param, format) for param, format in found if format is not None]


@functools.lru_cache
def _file_shapes(
    format: QuantizedFormat, shape: tuple[int, int]
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    matrix = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda w: _to_files(w, 1, False, format), matrix)


@functools.partial(jax.jit, static_argnames=("axes", "is_kernel", "format"))
def _to_files(
    w: jax.Array, axes: int, is_kernel: bool, format: QuantizedFormat
) -> tuple[jax.Array, jax.Array]:
    if is_kernel:
        rows = w.reshape(math.prod(w.shape[:axes]), -1).T
    else:
        rows = w.reshape(-1, math.prod(w.shape[w.ndim - axes :]))
    matrix = quantize_matrix(rows, format)
    scale = matrix.scale[...]
    return as_in_files(matrix.values[...], scale.shape[1]), scale


@functools.partial(jax.jit, static_argnames=("columns", "groups"))
def _on_device(values: jax.Array, columns: int, groups: int) -> jax.Array:
    return int4_from_files(values, columns, groups)


@functools.partial(jax.jit, static_argnames=("shape", "is_kernel", "is_int4"))
def _dequantize(
    values: Num[Array, "O stored"],
    scale: Float[Array, "O G"],
    shape: Shape,
    is_kernel: bool,
    is_int4: bool,
) -> jax.Array:
    if is_int4:
        values = unpack_int4(values, math.prod(shape) // values.shape[0], scale.shape[1])
    matrix = multiply_groups(values.astype(jnp.float32), scale)
    return matrix.T.reshape(shape) if is_kernel else matrix.reshape(shape)


def quantization_of(model: PaliGemma) -> QuantizationConfig | None:
    """The config that an unstacked model was quantized by; None for weights as they were trained.

    Raises ConfigError for a stacked model that is quantized, and for one of which weights of a kind
    are in different formats.
    """
    if not is_quantized(model):
        return None
    if not is_unstacked(model):
        raise ConfigError(
            "Expected a model of from_pretrained or quantize, got a stacked quantized one, the "
            "base of adapters. Save the adapters alone: save_adapter(model, path)"
        )
    return QuantizationConfig(**{kind: _format_of_kind(model, kind) for kind in KINDS})


def _format_of_kind(model: PaliGemma, kind: str) -> QuantizedFormat | None:
    only = QuantizationConfig(**{**dict.fromkeys(KINDS), kind: Int8()})
    found: set[QuantizedFormat | None] = set()
    matrices: list[tuple[Matrix, int]] = []
    for layer in _layers(model, only):
        linear = getattr(layer.owner, layer.name)
        if linear.matrix is None:
            found.add(None)
        else:
            columns = math.prod(linear.shape[axis] for axis in linear.axes.inputs)
            found.add(_format(linear.matrix, columns))
            matrices.append((linear.matrix, columns))
    grouped = {f for f in found if isinstance(f, Int4) and f.group is not None}
    if len(grouped) == 1 and found <= grouped | {Int4(None)}:
        (format,) = grouped
        if all(matrix.scale[...].shape[1] == format.groups(n) for matrix, n in matrices):
            return format
    if len(found) != 1:
        names = ", ".join(sorted(map(str, found)))
        raise ConfigError(
            f"Expected one format for each kind of weight, got {names} for {kind}. Quantize with "
            "quantize(model, QuantizationConfig(...))."
        )
    return found.pop()


def _format(matrix: Matrix, columns: int) -> QuantizedFormat:
    if isinstance(matrix, DynamicMatrix):
        return Int8Dynamic()
    assert isinstance(matrix, QuantizedMatrix)
    if matrix.values[...].dtype == FLOAT8:
        return Float8()
    groups = matrix.scale[...].shape[1]
    if matrix.bits == 8:
        return Int8()
    return Int4(None if groups == 1 else columns // groups)
