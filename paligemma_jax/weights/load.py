"""Loading weights onto devices: stacked as training wants them, or in the layout for inference.

Every array is written once, where it stays. With a mesh, no device ever holds more of a tensor than
its shard, and each process reads what its devices hold, as far as the format lets it: chunks of a
native checkpoint, any part of safetensors; an npz is read from beginning to end.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.inference_layout import abstract_unstacked, unstacked_params
from paligemma_jax.models.paligemma import PaliGemma, nest, split_model
from paligemma_jax.models.quantization import QuantizedParam, abstract_quantized, quantized_params
from paligemma_jax.models.quantization_config import Quantization, QuantizationConfig
from paligemma_jax.models.sharding import shardings
from paligemma_jax.weights.checkpoint import Checkpoint, open_checkpoint
from paligemma_jax.weights.tensors import (
    DTypeLike,
    Progress,
    TensorSource,
    TensorSpec,
    aligned_empty,
    as_float_dtype,
    chunk_places,
    largest_first,
    read_chunks,
)
from paligemma_jax.weights.views import Quantized, cast_floats, read_fused, resampled

# What a tensor, as it is stored, is to be: its dtype, and where it lies (None: default device).
Placement = Callable[[str, TensorSpec], tuple[np.dtype, NamedSharding | None]]


def load_params(
    path: str | os.PathLike[str],
    config: PaliGemmaConfig | None = None,
    dtype: DTypeLike = None,
    *,
    resolution: int | None = None,
    progress: Progress | None = None,
    verify: bool = True,
) -> tuple[PaliGemmaConfig, dict[str, Any]]:
    """The configuration and the parameters (nested dict of arrays, layers stacked) of a checkpoint.

    `dtype` casts every leaf; the stored dtypes stay otherwise. `resolution` (pixels) resamples the
    position embeddings. Arrays are on the default device, on a CPU without a copy. Peak memory is
    the parameters plus about one array. Raises CheckpointError.
    """
    with open_checkpoint(path, config=config, verify=verify) as checkpoint:
        return load_stacked(checkpoint, dtype, resolution=resolution, progress=progress)


def load_stacked(
    checkpoint: Checkpoint,
    dtype: DTypeLike = None,
    *,
    resolution: int | None = None,
    placement: Placement | None = None,
    progress: Progress | None = None,
) -> tuple[PaliGemmaConfig, dict[str, Any]]:
    """`load_params` of an opened checkpoint, the largest tensors first.

    `placement` chooses a dtype and a sharding for each tensor; all processes of a run must call
    this alike then. A host holds its devices' shards of one tensor at a time.
    """
    checkpoint.require_floats()
    source = resampled(checkpoint, resolution)
    wanted = None if dtype is None else as_float_dtype(dtype)
    leaves: dict[str, jax.Array] = {}
    done = 0
    for name in largest_first(source.specs):
        spec = source.specs[name]
        if progress:
            progress(name, done, source.nbytes)
        to, sharding = placement(name, spec) if placement else (wanted or spec.dtype, None)
        leaves[name] = put_tensor(source, name, to, sharding)
        done += spec.nbytes
    if progress:
        progress("", done, done)
    return source.config, nest(leaves)


def put_tensor(
    source: TensorSource, name: str, dtype: np.dtype, sharding: NamedSharding | None
) -> jax.Array:
    """One tensor on its devices, each with its own shard; raises CheckpointError."""
    if sharding is None:
        return jax.device_put(source.read(name, dtype))
    shape = source.specs[name].shape
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ends = (i.indices(n)[:2] for i, n in zip(index or (), shape, strict=True))
        devices.setdefault(tuple(ends), []).append(device)
    shards = {ends: aligned_empty(tuple(b - a for a, b in ends), dtype) for ends in devices}
    for index, place in enumerate(chunk_places(name, shape)):
        start, stop = _rows(place, shape)
        wanted = [e for e in shards if e[0][0] < stop and start < e[0][1]]
        if not wanted:
            continue
        # The smallest part of the chunk that has all that this process needs.
        part = [
            (min(a for a, _ in side), max(b for _, b in side)) for side in zip(*wanted, strict=True)
        ]
        part[0] = max(part[0][0], start), min(part[0][1], stop)
        rows = slice(part[0][0] - start, part[0][1] - start)
        inner = tuple(slice(*ends) for ends in part[1:])
        if isinstance(place, int):
            array = source.read_slice(name, index, inner, dtype)[None]
        else:
            array = source.read_slice(name, index, (rows, *inner), dtype)
        for ends in wanted:
            low, high = max(ends[0][0], part[0][0]), min(ends[0][1], part[0][1])
            own = [(low, high), *ends[1:]]
            shards[ends][low - ends[0][0] : high - ends[0][0]] = array[
                tuple(slice(a - p, b - p) for (a, b), (p, _) in zip(own, part, strict=True))
            ]
        del array
    arrays = []
    for ends, holders in devices.items():
        shard = shards.pop(ends)
        for number, device in enumerate(holders):
            # No two devices share memory: a donated shard must not be another device's too.
            copied = device.platform == "cpu" and number > 0
            put = jnp.array(shard, device=device) if copied else jax.device_put(shard, device)
            arrays.append(put)
        del shard
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays, dtype=dtype)


def _rows(place: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    if isinstance(place, int):
        return place, place + 1
    return (0, shape[0]) if place is ... else (place.start, place.stop)


def load_unstacked(
    checkpoint: Checkpoint,
    dtype: DTypeLike,
    *,
    resolution: int | None = None,
    quantize: Quantization | str | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> PaliGemma:
    """The model in the layout for inference, its floats and activations of `dtype`.

    `resolution` resamples the position embeddings. `quantize` quantizes floats as they are read;
    weights that are stored quantized stay as they are. Peak memory is that of the model and of one
    layer's largest parameter; no stacked parameter is ever in memory. On a `mesh` of one process,
    which has all three axes, no device ever holds more than its shards, one quantized parameter on
    its way to the others apart. Raises CheckpointError, and ConfigError for an unknown `quantize`.
    """
    source: TensorSource = resampled(cast_floats(checkpoint, as_float_dtype(dtype)), resolution)
    quantization = checkpoint.quantization
    if quantize is not None and quantization is None:
        quantization = QuantizationConfig.of(quantize)
        source = Quantized(source, quantization)
    model = abstract_unstacked(source.config, dtype)
    quantized: dict[str, QuantizedParam] = {}
    if quantization is not None:
        found = quantized_params(source.config, quantization)
        quantized = {param.target.paths[0]: param for param in found}
        model = abstract_quantized(model, quantization)
    graphdef, shapes = split_model(model)
    placed = None if mesh is None else shardings(shapes, mesh)
    return graphdef.merge_flat(dict(_arrays(source, quantized, placed, progress)))


def _arrays(
    source: TensorSource,
    quantized: Mapping[str, QuantizedParam],
    placed: Mapping[str, NamedSharding] | None,
    progress: Progress | None,
) -> Iterator[tuple[str, jax.Array]]:
    """Every parameter of the inference layout by its path, the largest first, layer by layer."""
    done, total = 0, source.nbytes
    largest = sorted(
        unstacked_params(source.config), key=lambda t: -math.prod(t.shape) * (t.depth or 1)
    )
    for target in largest:
        param = quantized.get(target.paths[0])
        names = [piece.path for piece in target.pieces]
        if param is not None:
            names = [param.values, param.scale]
        if progress:
            progress(names[0], done, total)
        if param is not None:
            yield from _quantized(source, param, placed)
        elif target.depth is None:
            (path,) = target.paths
            dtype, sharding = source.specs[path].dtype, None if placed is None else placed[path]
            yield path, put_tensor(source, path, dtype, sharding)
        else:
            for layer, path in enumerate(target.paths):
                dtype = source.specs[names[0]].dtype
                yield path, _put(read_fused(source, target, layer, dtype), path, placed)
        done += sum(source.specs[name].nbytes for name in names)
    if progress:
        progress("", done, total)


def _quantized(
    source: TensorSource, param: QuantizedParam, placed: Mapping[str, NamedSharding] | None
) -> Iterator[tuple[str, jax.Array]]:
    names = (param.values, param.scale)
    layers: Iterator[list[np.ndarray]] = read_chunks(source, names)
    if param.target.depth is None:  # a table, of which the chunks are put together
        specs = [source.specs[name] for name in names]
        whole = [aligned_empty(spec.shape, spec.dtype) for spec in specs]
        places = chunk_places(param.values, specs[0].shape)
        for place, arrays in zip(places, layers, strict=True):
            for target, array in zip(whole, arrays, strict=True):
                target[place] = array
        layers = iter([whole])
    for owner, arrays in zip(param.owners, layers, strict=True):
        values, scale = map(jax.device_put, arrays)
        del arrays
        for name, array in (("values", param.on_device(values, scale)), ("scale", scale)):
            path = f"{owner}/matrix/{name}"
            yield path, _put(array, path, placed)


def _put(array: Any, path: str, placed: Mapping[str, NamedSharding] | None) -> jax.Array:
    return jax.device_put(array, None if placed is None else placed[path])
