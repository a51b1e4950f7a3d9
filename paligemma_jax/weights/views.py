"""Weights seen in another way: cast, resampled, quantized, dequantized, checked, or from memory.

Views are `TensorSource`s over another one. They compose, and change a chunk when it is read.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.models.inference_layout import (
    ParamSlice,
    UnstackedParam,
    is_unstacked,
    unstacked_params,
)
from paligemma_jax.models.lora import merge_lora
from paligemma_jax.models.paligemma import PaliGemma, flatten, to_params
from paligemma_jax.models.quantization import QuantizedParam, quantization_of, quantized_params
from paligemma_jax.models.quantization_config import QuantizationConfig
from paligemma_jax.models.quantized_matrix import as_in_files
from paligemma_jax.weights.tensors import (
    EMBEDDING_TABLES,
    FLOATS,
    SCALE,
    VALUES,
    Progress,
    Shape,
    TensorSource,
    TensorSpec,
    aligned_empty,
    chunk_places,
    chunk_shapes,
    copy_into,
    expected_shapes,
    resample_position_embeddings,
)

POSITIONS = "img/pos_embed"
# Bits that are all set in infinities and NaNs: of the exponent, or in e4m3fn all but the sign.
_EXPONENT = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80, "float8_e4m3fn": 0x7F}
_BLOCK = 8 << 20  # elements


class View(TensorSource):
    """Another source, with a configuration or dtypes of its own."""

    def __init__(
        self,
        source: TensorSource,
        config: PaliGemmaConfig | None = None,
        specs: Mapping[str, TensorSpec] | None = None,
    ):
        self.source = source
        self.config = config or source.config
        self.specs = source.specs if specs is None else specs

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        self.source.read_chunk(name, index, out)


def cast(source: TensorSource, dtypes: Mapping[str, np.dtype]) -> View:
    """Weights of other dtypes, by their names."""
    specs = {n: dataclasses.replace(s, dtype=dtypes[n]) for n, s in source.specs.items()}
    return View(source, specs=specs)


def cast_floats(source: TensorSource, dtype: np.dtype) -> View:
    """Weights of another dtype; quantized values and scales stay as they are."""
    quantized = (VALUES, SCALE)
    return cast(
        source,
        {n: s.dtype if n.endswith(quantized) else dtype for n, s in source.specs.items()},
    )


def with_resolution(config: PaliGemmaConfig, resolution: int | None) -> PaliGemmaConfig:
    """The configuration for images of `resolution` pixels a side; None leaves it alone."""
    if resolution is None or resolution == config.img.image_size:
        return config
    return dataclasses.replace(config, img=dataclasses.replace(config.img, image_size=resolution))


def resampled(source: TensorSource, resolution: int | None) -> TensorSource:
    """Weights for images of another size; the same for None. Raises CheckpointError."""
    config = with_resolution(source.config, resolution)
    return source if config == source.config else _Resampled(source, config)


class _Resampled(View):
    def __init__(self, source: TensorSource, config: PaliGemmaConfig):
        spec = source.specs[POSITIONS]
        shape = (1, config.img.num_patches, spec.shape[-1])
        specs = {**source.specs, POSITIONS: TensorSpec(shape, spec.dtype)}
        super().__init__(source, config, specs)

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        if name != POSITIONS:
            return super().read_chunk(name, index, out)
        stored = self.source.specs[name].dtype
        wider = stored if stored.itemsize > out.itemsize else out.dtype
        array = self.source.read(name, wider)
        copy_into(out, resample_position_embeddings(array, self.config.img.num_patches))

    def read_slice(
        self, name: str, index: int, part: tuple[slice, ...], dtype: np.dtype
    ) -> np.ndarray:
        if name == POSITIONS:
            return super().read_slice(name, index, part, dtype)
        return self.source.read_slice(name, index, part, dtype)


class Checked(View):
    """The same weights; CheckpointError at the first that is infinite or NaN.

    `what` names them in the message, `stored` has their dtypes before any cast, and `progress`
    is called before every chunk with what has been read of `total` bytes.
    """

    def __init__(
        self,
        source: TensorSource,
        what: str,
        stored: Mapping[str, TensorSpec],
        progress: Progress | None = None,
        total: int = 0,
    ):
        super().__init__(source)
        self._what, self._stored = what, stored
        self._progress, self._total, self._done = progress, total, 0

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        if self._progress:
            self._progress(name, self._done, self._total)
        with np.errstate(over="ignore"):  # reported below, with the name
            super().read_chunk(name, index, out)
        self._done += out.size * self.specs[name].dtype.itemsize
        if is_finite(out):
            return
        if name in self._stored and out.dtype != self._stored[name].dtype:
            raise CheckpointError(
                f"{name} of {self._what} has values that {out.dtype} cannot hold, or that are not "
                "finite; bfloat16 has the range of float32. Choose another dtype: "
                "dtype='bfloat16' (--dtype bfloat16)"
            )
        raise CheckpointError(
            f"{name} of {self._what} holds infinite values or NaN: the training that made it "
            "diverged. Use an earlier checkpoint."
        )


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is infinite or NaN; of any strides, block by block."""
    if array.dtype.name not in _EXPONENT:
        return True  # integers
    bits = array.view(f"u{array.itemsize}").ravel(order="K")
    exponent = bits.dtype.type(_EXPONENT[array.dtype.name])
    return not any(
        np.any((bits[start : start + _BLOCK] & exponent) == exponent)
        for start in range(0, bits.size, _BLOCK)
    )


def quantized_specs(
    config: PaliGemmaConfig, quantization: QuantizationConfig | None
) -> dict[str, TensorSpec]:
    """The values and scales that a checkpoint with this quantization has; none without one."""
    specs: dict[str, TensorSpec] = {}
    for param in quantized_params(config, quantization) if quantization else ():
        lead = () if param.target.depth is None else (param.target.depth,)
        for path, found in zip((param.values, param.scale), param.file_shapes(), strict=True):
            specs[path] = TensorSpec((*lead, *found.shape), np.dtype(found.dtype))
    return specs


def float_shapes(
    config: PaliGemmaConfig, quantization: QuantizationConfig | None
) -> dict[str, Shape]:
    """The tensors that stay floats, layers stacked."""
    shapes = dict(expected_shapes(config))
    for param in quantized_params(config, quantization) if quantization else ():
        for piece in param.target.pieces:
            del shapes[piece.path]
    return shapes


def weight_counts(config: PaliGemmaConfig, quantization: QuantizationConfig) -> dict[str, int]:
    """How many weights are in each quantized format, by names such as "int4"."""
    counts: dict[str, int] = {}
    for param in quantized_params(config, quantization):
        name = type(param.format).__name__.removesuffix("Dynamic").lower()
        size = math.prod(param.target.shape) * (param.target.depth or 1)
        counts[name] = counts.get(name, 0) + size
    return counts


class Quantized(View):
    """Floats quantized as they are read.

    The values and scales of the last chunk are kept: read them in turn (`tensor_groups`). Weights
    are quantized from their own dtype, or from float32 where those that are fused have several.
    """

    def __init__(self, source: TensorSource, quantization: QuantizationConfig):
        floats = float_shapes(source.config, quantization)
        quantized = quantized_specs(source.config, quantization)
        super().__init__(source, specs=quantized | {n: source.specs[n] for n in floats})
        self._params: dict[str, QuantizedParam] = {}
        for param in quantized_params(source.config, quantization):
            self._params |= {param.values: param, param.scale: param}
        self._last: tuple[str, int] | None = None
        self._pair: tuple[np.ndarray, np.ndarray] | None = None

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        if name not in self._params:
            return super().read_chunk(name, index, out)
        param = self._params[name]
        if self._pair is None or self._last != (param.owner, index):
            self._last, self._pair = (param.owner, index), None
            self._pair = self._quantize(param, index)
        copy_into(out, self._pair[name == param.scale])

    def _quantize(self, param: QuantizedParam, index: int) -> tuple[np.ndarray, np.ndarray]:
        target, source = param.target, self.source
        dtypes = {source.specs[piece.path].dtype for piece in target.pieces}
        dtype = dtypes.pop() if len(dtypes) == 1 else FLOATS["float32"]
        if target.depth is None:
            (path,) = target.paths
            array = aligned_empty(chunk_shapes(path, source.specs[path].shape)[index], dtype)
            source.read_chunk(path, index, array)
        else:
            array = read_fused(source, target, index, dtype)
        values, scale = param.quantize(jnp.asarray(array))
        return np.asarray(values), np.asarray(scale)


def read_fused(
    source: TensorSource, target: UnstackedParam, layer: int, dtype: np.dtype
) -> np.ndarray:
    """One layer's parameter of the layout for inference, its parts read straight into place."""
    array = aligned_empty(target.shape, dtype)
    for piece in target.pieces:
        source.read_chunk(piece.path, layer, piece.view(array))
    return array


class Dequantized(View):
    """Floats made of quantized weights, as far as they are still known."""

    def __init__(self, source: TensorSource, quantization: QuantizationConfig, dtype: np.dtype):
        self._pieces = {
            piece.path: (param, piece)
            for param in quantized_params(source.config, quantization)
            for piece in param.target.pieces
        }
        specs = {
            name: TensorSpec(shape, dtype) if name in self._pieces else source.specs[name]
            for name, shape in expected_shapes(source.config).items()
        }
        super().__init__(source, specs=specs)

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        if name not in self._pieces:
            return super().read_chunk(name, index, out)
        param, piece = self._pieces[name]
        pair = []
        for path in (param.values, param.scale):
            spec = self.source.specs[path]
            pair.append(aligned_empty(chunk_shapes(path, spec.shape)[index], spec.dtype))
            self.source.read_chunk(path, index, pair[-1])
        values, scale = map(jnp.asarray, pair)
        shape = param.target.shape
        if name in EMBEDDING_TABLES:  # some rows at a time
            shape = (len(values), *shape[1:])
        array = np.asarray(param.dequantize(values, scale, shape))
        copy_into(out, array if param.target.depth is None else piece.view(array))


class ArrayWeights(TensorSource):
    """Parameters in memory by their paths, layers stacked, as numpy or JAX arrays.

    Arrays that several processes hold in shards are gathered chunk by chunk: all of the processes
    must read the same in the same order.
    """

    def __init__(self, config: PaliGemmaConfig, arrays: Mapping[str, Any]):
        self.config = config
        self._arrays = arrays
        self.specs = {
            name: TensorSpec(tuple(array.shape), np.dtype(array.dtype))
            for name, array in arrays.items()
        }

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        array = self._arrays[name]
        place = chunk_places(name, self.specs[name].shape)[index]
        copy_into(out, to_host(array)[place] if _on_cpu(array) else _fetch(array, place))


def to_host(array: Any) -> np.ndarray:
    """The whole array in every process; on a CPU without a copy."""
    if isinstance(array, jax.Array) and array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(_replicate(_sharding(array))(array).addressable_data(0))
    return np.asarray(array)


def _on_cpu(array: Any) -> bool:
    """Whether `to_host` copies nothing."""
    if not isinstance(array, jax.Array):
        return True
    devices = array.sharding.device_set
    return array.is_fully_replicated and all(device.platform == "cpu" for device in devices)


def _fetch(array: jax.Array, place: Any) -> np.ndarray:
    """One chunk of an array on other devices; of several processes', in each of them."""
    if place is ...:
        return to_host(array)
    if array.is_fully_replicated:
        array = array.addressable_data(0)
    is_layer = isinstance(place, int)
    start, stop = (place, place + 1) if is_layer else (place.start, place.stop)
    # The start is an argument, not a constant: one compiled function serves all chunks.
    if not array.is_fully_addressable:
        rows = _take(_sharding(array), stop - start)(array, start)
        result = np.asarray(rows.addressable_data(0))
        return result[0] if is_layer else result
    result = np.empty((stop - start, *array.shape[1:]), array.dtype)
    for shard in array.addressable_shards:
        first, last, _ = shard.index[0].indices(array.shape[0])
        low, high = max(first, start), min(last, stop)
        if low < high and shard.replica_id == 0:
            part = jax.lax.dynamic_slice_in_dim(shard.data, low - first, high - low)
            result[(slice(low - start, high - start), *shard.index[1:])] = np.asarray(part)
    return result[0] if is_layer else result


def _sharding(array: jax.Array) -> NamedSharding:
    if not isinstance(array.sharding, NamedSharding):
        raise TypeError(f"{array.sharding} of an array of several processes has no mesh")
    return NamedSharding(array.sharding.mesh, PartitionSpec())


@functools.lru_cache(64)
def _replicate(sharding: NamedSharding) -> Any:
    return jax.jit(jnp.copy, out_shardings=sharding)


@functools.lru_cache(64)
def _take(sharding: NamedSharding, size: int) -> Any:
    return jax.jit(
        lambda array, start: jax.lax.dynamic_slice_in_dim(array, start, size),
        out_shardings=sharding,
    )


def model_weights(model: PaliGemma) -> TensorSource:
    """The weights that a checkpoint of the model holds, adapters merged, quantized as they are.

    `quantization_of` tells the quantization. Raises ConfigError for what cannot be in a checkpoint.
    """
    model = merge_lora(model)
    quantization = quantization_of(model)
    if is_unstacked(model):
        return _UnstackedWeights(model, quantization)
    return ArrayWeights(model.config, flatten(to_params(model)))


class _UnstackedWeights(ArrayWeights):
    """Of a model in the layout for inference, whose layers are separate and fused."""

    def __init__(self, model: PaliGemma, quantization: QuantizationConfig | None):
        self.config = model.config
        self._arrays: Mapping[str, Any] = flatten(to_params(model))
        shapes = float_shapes(model.config, quantization)
        self._pieces: dict[str, tuple[UnstackedParam, ParamSlice]] = {
            piece.path: (target, piece)
            for target in unstacked_params(model.config)
            for piece in target.pieces
            if piece.path in shapes
        }
        self.specs = {
            path: TensorSpec(shapes[path], np.dtype(self._arrays[target.paths[0]].dtype))
            for path, (target, _) in self._pieces.items()
        } | quantized_specs(model.config, quantization)
        self._quantized: dict[str, QuantizedParam] = {}
        for param in quantized_params(model.config, quantization) if quantization else ():
            self._quantized |= {param.values: param, param.scale: param}
        self._last: tuple[str, np.ndarray] | None = None  # of an embedding table

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        if name in self._quantized:
            return self._read_quantized(self._quantized[name], name, index, out)
        target, piece = self._pieces[name]
        if target.depth is None:
            return super().read_chunk(name, index, out)
        copy_into(out, piece.view(to_host(self._arrays[target.paths[index]])))

    def _read_quantized(
        self, param: QuantizedParam, name: str, index: int, out: np.ndarray
    ) -> None:
        if self._last is not None and self._last[0] == name:
            array = self._last[1]
        else:
            owner = param.owners[0 if param.target.depth is None else index]
            values, scale = self._arrays[f"{owner}{VALUES}"], self._arrays[f"{owner}{SCALE}"]
            is_scale = name == param.scale
            array = to_host(scale if is_scale else as_in_files(values, scale.shape[1]))
        if param.target.depth is None:
            self._last = (name, array)
            array = array[chunk_places(name, array.shape)[index]]
        copy_into(out, array)
