"""Weights seen through a change: another dtype or resolution, watched, or refused if not finite.

Weights of few bits, made from floats piece by piece as they are read.

Arrays at hand as `Weights`, wherever JAX keeps them.

A model in memory as `Weights`, whichever form its layers are in.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
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
    FLOATS,
    SCALE,
    TABLES,
    VALUES,
    Fill,
    Progress,
    TensorSpec,
    TreeShape,
    Weights,
    aligned_empty,
    expected_shapes,
    fill_from,
    piece_places,
    piece_shapes,
    read_pieces,
    read_tensor,
    resample_position_embeddings,
    split,
)

POSITIONS = "img/pos_embed"
# Bits that are all set in infinities and NaNs: of the exponent, or in e4m3fn all but the sign.
_EXPONENT = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80, "float8_e4m3fn": 0x7F}
_BLOCK = 8 << 20  # elements


class Cast:
    """Weights of other dtypes, by their paths."""

    def __init__(self, weights: Weights, dtypes: Mapping[str, np.dtype]):
        self._weights = weights
        self.config = weights.config
        self.specs = {
            name: dataclasses.replace(spec, dtype=dtypes[name])
            for name, spec in weights.specs.items()
        }

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        return self._weights.pieces(name, dtype)


def cast_floats(weights: Weights, dtype: np.dtype) -> Weights:
    """Weights of another dtype; values and scales of few bits stay as they are."""
    return Cast(
        weights,
        {
            name: spec.dtype if name.endswith((VALUES, SCALE)) else dtype
            for name, spec in weights.specs.items()
        },
    )


class Resampled:
    """Weights for pictures of another size; raises CheckpointError, as the resampling does."""

    def __init__(self, weights: Weights, config: PaliGemmaConfig):
        self._weights = weights
        self.config = config
        spec = weights.specs[POSITIONS]
        shape = (1, config.img.num_patches, spec.shape[-1])
        self.specs = {**weights.specs, POSITIONS: TensorSpec(shape, spec.dtype)}

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        if name != POSITIONS:
            yield from self._weights.pieces(name, dtype)
            return
        stored = self._weights.specs[name].dtype
        wider = stored if stored.itemsize > dtype.itemsize else dtype
        array = read_tensor(self._weights, name, wider)
        array = resample_position_embeddings(array, self.config.img.num_patches)
        yield fill_from(array)


class Finite:
    """The same weights; CheckpointError at the first that is infinite or NaN.

    `what` names them in the message, and `stored` are their dtypes before they were cast.
    """

    def __init__(self, weights: Weights, what: str, stored: Mapping[str, TensorSpec]):
        self._weights = weights
        self._what = what
        self._stored = stored
        self.config = weights.config
        self.specs = weights.specs

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        for fill in self._weights.pieces(name, dtype):
            yield functools.partial(self._fill, name, fill)

    def _fill(self, name: str, fill: Fill, target: np.ndarray) -> None:
        with np.errstate(over="ignore"):  # it is told below, with the name
            fill(target)
        if is_finite(target):
            return
        if target.dtype != self._stored[name].dtype:
            raise CheckpointError(
                f"{name} of {self._what} has values that {target.dtype} cannot hold, or that are "
                "not finite. bfloat16 has the range of float32. Choose another dtype: "
                "dtype='bfloat16' (--dtype bfloat16)"
            )
        raise CheckpointError(
            f"{name} of {self._what} holds infinite values or NaN. Finite weights fit: the "
            "training that made them diverged. Take an earlier checkpoint."
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


class Watched:
    """The same weights; `progress` hears of every piece that is read."""

    def __init__(self, weights: Weights, progress: Progress, total: int):
        self._weights = weights
        self._progress = progress
        self._total = total
        self._done = 0
        self.config = weights.config
        self.specs = weights.specs

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        for fill in self._weights.pieces(name, dtype):
            self._progress(name, self._done, self._total)
            yield functools.partial(self._fill, name, fill)

    def _fill(self, name: str, fill: Fill, target: np.ndarray) -> None:
        fill(target)
        self._done += target.size * self.specs[name].dtype.itemsize

    def finish(self) -> None:
        """All is done."""
        self._progress("", self._total, self._total)


Pair = tuple[np.ndarray, np.ndarray]  # values and scales of a piece


def few_bit_specs(
    config: PaliGemmaConfig, quantization: QuantizationConfig
) -> dict[str, TensorSpec]:
    """The values and scales that a file of a model has by this quantization."""
    specs: dict[str, TensorSpec] = {}
    for rounded in quantized_params(config, quantization):
        depth = rounded.target.depth
        lead = () if depth is None else (depth,)
        for path, found in zip((rounded.values, rounded.scale), rounded.file_shapes(), strict=True):
            specs[path] = TensorSpec((*lead, *found.shape), np.dtype(found.dtype))
    return specs


def float_shapes(
    config: PaliGemmaConfig, quantization: QuantizationConfig | None
) -> dict[str, TreeShape]:
    """The tensors that stay floats, layers stacked."""
    shapes = expected_shapes(config)
    for rounded in quantized_params(config, quantization) if quantization else ():
        for piece in rounded.target.pieces:
            del shapes[piece.path]
    return shapes


class RoundedWeights:
    """What becomes of floats by a quantization; see `Weights`.

    A piece of values is rounded when it is read, and its scales are kept until the next one is: so
    read them in turn (`families`). Weights are rounded in their own dtype, or in float32 where
    those that are joined to a matrix have several.
    """

    def __init__(self, weights: Weights, quantization: QuantizationConfig):
        self.config = weights.config
        self._weights = weights
        few_bits = few_bit_specs(self.config, quantization)
        floats = float_shapes(self.config, quantization)
        self.specs: Mapping[str, TensorSpec] = few_bits | {n: weights.specs[n] for n in floats}
        self._places: dict[str, tuple[QuantizedParam, int]] = {}
        for rounded in quantized_params(self.config, quantization):
            self._places |= {rounded.values: (rounded, 0), rounded.scale: (rounded, 1)}
        self._last: tuple[str, int, Pair] | None = None

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        if name not in self._places:
            yield from self._weights.pieces(name, dtype)
            return
        rounded, which = self._places[name]
        made: Iterator[tuple[int, Pair]] | None = None
        for number in range(len(piece_shapes(name, self.specs[name].shape))):
            if which == 1 and self._last is not None and self._last[:2] == (rounded.owner, number):
                pair = self._last[2]
            else:
                made = made or enumerate(self._rounded(rounded))
                pair = next(pair for n, pair in made if n == number)
                self._last = (rounded.owner, number, pair)
            yield fill_from(pair[which])
        for _ in made or ():  # the digest of the last piece is compared after it
            pass

    def _rounded(self, rounded: QuantizedParam) -> Iterator[Pair]:
        target = rounded.target
        dtypes = {self._weights.specs[piece.path].dtype for piece in target.pieces}
        dtype = dtypes.pop() if len(dtypes) == 1 else FLOATS["float32"]
        parts = [self._weights.pieces(piece.path, dtype) for piece in target.pieces]
        first = target.pieces[0].path
        for shape, *fills in zip(
            piece_shapes(first, self._weights.specs[first].shape), *parts, strict=True
        ):
            array = aligned_empty(shape if target.depth is None else target.shape, dtype)
            for piece, fill in zip(target.pieces, fills, strict=True):
                fill(array if target.depth is None else piece.view(array))
            values, scale = rounded.quantize(jnp.asarray(array))
            yield np.asarray(values), np.asarray(scale)


class WidenedWeights:
    """Floats made of weights of few bits, as far as they are still known; see `Weights`."""

    def __init__(self, weights: Weights, quantization: QuantizationConfig, dtype: np.dtype):
        self.config = weights.config
        self._weights = weights
        shapes = expected_shapes(self.config)
        self._pieces = {
            piece.path: (rounded, number)
            for rounded in quantized_params(self.config, quantization)
            for number, piece in enumerate(rounded.target.pieces)
        }
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(shape, dtype) if name in self._pieces else weights.specs[name]
            for name, shape in shapes.items()
        }

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        if name not in self._pieces:
            yield from self._weights.pieces(name, dtype)
            return
        rounded, number = self._pieces[name]
        piece, depth = rounded.target.pieces[number], rounded.target.depth
        for values, scale in read_pieces(self._weights, (rounded.values, rounded.scale)):
            shape = rounded.target.shape
            if name in TABLES:  # some rows at a time
                shape = (len(values), *shape[1:])
            array = np.asarray(rounded.dequantize(jnp.asarray(values), jnp.asarray(scale), shape))
            yield fill_from(array if depth is None else piece.view(array))


def weight_counts(config: PaliGemmaConfig, quantization: QuantizationConfig) -> dict[str, int]:
    """How many weights are in each format, by names such as "int4"; floats are left out."""
    counts: dict[str, int] = {}
    for rounded in quantized_params(config, quantization):
        name = type(rounded.format).__name__.removesuffix("Dynamic").lower()
        size = math.prod(rounded.target.shape) * (rounded.target.depth or 1)
        counts[name] = counts.get(name, 0) + size
    return counts


class ArrayWeights:
    """Parameters by their paths, layers stacked, as numpy or JAX arrays; see `Weights`.

    Arrays that several processes hold in parts are gathered piece by piece: all of them must read
    the same in the same order.
    """

    def __init__(self, config: PaliGemmaConfig, arrays: Mapping[str, Any]):
        self.config = config
        self._arrays = arrays
        self.specs = {
            name: TensorSpec(tuple(array.shape), np.dtype(array.dtype))
            for name, array in arrays.items()
        }

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        array = self._arrays[name]
        if not isinstance(array, jax.Array) or array.is_fully_replicated or _is_at_hand(array):
            array = to_host(array)
        for place in piece_places(name, self.specs[name].shape):
            part = array[place] if isinstance(array, np.ndarray) else _fetch(array, place)
            yield fill_from(part)


def to_host(array: Any) -> np.ndarray:
    """The whole array in every process; on a CPU without a copy."""
    if isinstance(array, jax.Array) and array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return _gather(array, ...)
    return np.asarray(array)


def _is_at_hand(array: jax.Array) -> bool:
    devices = array.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _fetch(array: jax.Array, place: Any) -> np.ndarray:
    """One piece, from the devices that have a part of it."""
    if not array.is_fully_addressable:
        return _gather(array, place)
    if place is ...:
        return np.asarray(array)
    is_layer = isinstance(place, int)
    start, stop = (place, place + 1) if is_layer else (place.start, place.stop)
    result = np.empty((stop - start, *array.shape[1:]), array.dtype)
    for shard in array.addressable_shards:
        first, last, _ = shard.index[0].indices(array.shape[0])
        low, high = max(first, start), min(last, stop)
        if low < high and shard.replica_id == 0:
            # The place is no constant of the program, which is compiled once.
            part = jax.lax.dynamic_slice_in_dim(shard.data, low - first, high - low)
            result[(slice(low - start, high - start), *shard.index[1:])] = np.asarray(part)
    return result[0] if is_layer else result


def _gather(array: jax.Array, place: Any) -> np.ndarray:
    """One piece of what several processes hold in parts, in each of them."""
    if place is ...:
        return np.asarray(_whole(array).addressable_data(0))
    is_layer = isinstance(place, int)
    start, size = (place, 1) if is_layer else (place.start, place.stop - place.start)
    result = np.asarray(_rows(array, start, size).addressable_data(0))
    return result[0] if is_layer else result


def _everywhere(array: jax.Array) -> Any:
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"{sharding} of an array of several processes has no mesh")
    return NamedSharding(sharding.mesh, PartitionSpec())


def _whole(array: jax.Array) -> jax.Array:
    return jax.jit(jnp.copy, out_shardings=_everywhere(array))(array)


def _rows(array: jax.Array, start: int, size: int) -> jax.Array:
    """The place is no constant of the program, which is compiled once for each shape."""
    return _take(_everywhere(array), size)(array, start)


@functools.lru_cache(64)
def _take(sharding: NamedSharding, size: int) -> Any:
    def rows(array: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array, start, size)

    return jax.jit(rows, out_shardings=sharding)


def model_weights(model: PaliGemma) -> Weights:
    """The weights that a file of the model holds, adapters merged; rounded ones as they are.

    `quantization_of` tells what they are quantized by. Raises ConfigError for what cannot be in a
    file.
    """
    model = merge_lora(model)
    quantization = quantization_of(model)
    if is_unstacked(model):
        return UnrolledWeights(model, quantization)
    return ArrayWeights(model.config, flatten(to_params(model)))


class UnrolledWeights:
    """Of a model whose layers stand one by one, fused and in another order; see `Weights`."""

    def __init__(self, model: PaliGemma, quantization: QuantizationConfig | None = None):
        self.config = model.config
        self._params: dict[str, Any] = flatten(to_params(model))
        shapes = float_shapes(model.config, quantization)
        self._found: dict[str, tuple[UnstackedParam, ParamSlice]] = {
            piece.path: (target, piece)
            for target in unstacked_params(model.config)
            for piece in target.pieces
            if piece.path in shapes
        }
        self._whole = ArrayWeights(
            model.config,
            {
                path: self._params[path]
                for path, (target, _) in self._found.items()
                if target.depth is None
            },
        )
        self.specs = {
            path: TensorSpec(shapes[path], np.dtype(self._params[target.paths[0]].dtype))
            for path, (target, _) in self._found.items()
        }
        self._rounded: dict[str, QuantizedParam] = {}
        if quantization is not None:
            self.specs |= few_bit_specs(model.config, quantization)
            for rounded in quantized_params(model.config, quantization):
                self._rounded |= {rounded.values: rounded, rounded.scale: rounded}

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        if name in self._rounded:
            yield from self._pieces_of_few_bits(name, self._rounded[name])
            return
        target, piece = self._found[name]
        if target.depth is None:
            yield from self._whole.pieces(name, dtype)
            return
        for path in target.paths:
            yield fill_from(piece.view(to_host(self._params[path])))

    def _pieces_of_few_bits(self, name: str, rounded: QuantizedParam) -> Iterator[Fill]:
        for owner in rounded.owners:
            values, scale = self._params[f"{owner}{VALUES}"], self._params[f"{owner}{SCALE}"]
            is_scale = name == rounded.scale
            found = to_host(scale if is_scale else as_in_files(values, scale.shape[1]))
            parts = [found] if rounded.target.depth is not None else split(name, found)
            yield from map(fill_from, parts)
