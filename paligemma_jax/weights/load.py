"""Loading a checkpoint's parameters, leaf by leaf.

Parameters that are read straight onto the devices of a mesh, each device its own shard.

No device ever holds more of the model than its shards, and a host beside them one piece of a tensor
(a layer's, or some rows of a table) or, of a table that is split by rows, one device's rows.

Where the arrays of a model go as they are read: to one device, or over a mesh.

Loading a checkpoint as a model for inference, layer by layer and each array where it stays.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.inference_layout import (
    UnstackedParam,
    abstract_unstacked,
    unstacked_params,
)
from paligemma_jax.models.paligemma import PaliGemma, nest, split_model
from paligemma_jax.models.quantization import QuantizedParam, abstract_quantized, quantized_params
from paligemma_jax.models.quantization_config import Quantization, QuantizationConfig
from paligemma_jax.models.sharding import shardings
from paligemma_jax.weights.checkpoint import Checkpoint, open_checkpoint
from paligemma_jax.weights.tensors import (
    Box,
    DTypeLike,
    Progress,
    SourceShape,
    TensorSpec,
    Weights,
    aligned_empty,
    as_float_dtype,
    expected_shapes,
    largest_first,
    piece_places,
    read_boxes,
    read_pieces,
    read_tensor,
    read_together,
    resample_position_embeddings,
)
from paligemma_jax.weights.views import POSITIONS, RoundedWeights, cast_floats


def load_params(
    path: str | os.PathLike[str],
    config: PaliGemmaConfig | None = None,
    dtype: DTypeLike = None,
    *,
    resolution: int | None = None,
    progress: Progress | None = None,
    verify: bool = True,
) -> tuple[PaliGemmaConfig, dict[str, Any]]:
    """The configuration and the parameters (nested dict of arrays) of a checkpoint.

    `dtype` casts every leaf; the stored dtypes stay otherwise. `resolution` (pixels) resamples the
    position embeddings. Arrays are on the default device, on a CPU without a copy; for several
    devices see `load_on_mesh`. Peak memory is the parameters plus about one array. Raises
    CheckpointError.
    """
    with open_checkpoint(path, config=config, verify=verify) as checkpoint:
        return load_from(checkpoint, dtype, resolution=resolution, progress=progress)


def load_from(
    checkpoint: Checkpoint,
    dtype: DTypeLike = None,
    *,
    resolution: int | None = None,
    progress: Progress | None = None,
) -> tuple[PaliGemmaConfig, dict[str, Any]]:
    """`load_params` of an opened checkpoint."""
    checkpoint.require_floats()
    config = with_resolution(checkpoint.config, resolution)
    leaves = load_leaves(checkpoint, config, dtype, progress=progress)
    return config, nest(dict(leaves))


def with_resolution(config: PaliGemmaConfig, resolution: int | None) -> PaliGemmaConfig:
    """The configuration for pictures of `resolution` pixels a side; None leaves it alone."""
    if resolution is None or resolution == config.img.image_size:
        return config
    return dataclasses.replace(config, img=dataclasses.replace(config.img, image_size=resolution))


def load_leaves(
    checkpoint: Checkpoint,
    config: PaliGemmaConfig,
    dtype: DTypeLike = None,
    *,
    progress: Progress | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Every parameter by its path, read when asked for, the largest first."""
    for name, array in checkpoint.tensors(dtype, progress):
        if name == POSITIONS:
            array = resample_position_embeddings(array, config.img.num_patches)
        yield name, jax.device_put(array)


# What a tensor, as it is stored, is to be: its dtype, and where it lies.
Wanted = Callable[[str, TensorSpec], tuple[np.dtype, NamedSharding]]


def load_on_mesh(
    checkpoint: Checkpoint,
    config: PaliGemmaConfig,
    wanted: Wanted,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The parameters (nested dict of arrays, layers stacked), the largest first.

    `config` may have another resolution than the checkpoint's; position embeddings are resampled
    then. In a run of several processes all of them call this alike; each reads no more than its
    devices hold, where the format lets it: pieces of a store, any part of safetensors. An npz is
    read from beginning to end. Raises CheckpointError.
    """
    checkpoint.require_floats()
    leaves: dict[str, jax.Array] = {}
    shapes, done = expected_shapes(config), 0
    for name in largest_first(checkpoint.specs):
        spec = checkpoint.specs[name]
        if progress:
            progress(name, done, checkpoint.nbytes)
        dtype, sharding = wanted(name, TensorSpec(shapes[name], spec.dtype))
        if name == POSITIONS:
            wider = spec.dtype if spec.dtype.itemsize > dtype.itemsize else dtype
            array = checkpoint.read(name, wider)
            array = resample_position_embeddings(array, config.img.num_patches)
            leaves[name] = put(array.astype(dtype, copy=False), sharding)
        else:
            leaves[name] = put_tensor(checkpoint, name, dtype, sharding)
        done += spec.nbytes
    if progress:
        progress("", done, checkpoint.nbytes)
    return nest(leaves)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that is at hand, on its devices: each gets its own part."""
    shards = Shards(array.shape, array.dtype, sharding)
    shards.write(tuple(slice(0, size) for size in array.shape), array)
    return shards.finish()


def put_tensor(weights: Weights, name: str, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    """One parameter, read piece by piece onto its devices; raises CheckpointError."""
    spec = weights.specs[name]
    split_by_rows = sharding.shard_shape(spec.shape)[:1] != spec.shape[:1]
    if split_by_rows or piece_places(name, spec.shape) == [...] or _share_memory(sharding):
        return put_as_it_comes(weights, name, dtype, sharding)
    return put_and_join(weights, name, dtype, sharding)


def put_as_it_comes(
    weights: Weights, name: str, dtype: np.dtype, sharding: NamedSharding
) -> jax.Array:
    """`put_tensor` where a device's part is complete before the next one begins.

    So it is by rows, and where what is filled is the devices' own memory: on CPUs.
    """
    shards = Shards(weights.specs[name].shape, dtype, sharding)
    for box, part in _parts(weights, name, dtype, shards):
        shards.write(box, part)
        del part
    return shards.finish()


def put_and_join(
    weights: Weights, name: str, dtype: np.dtype, sharding: NamedSharding
) -> jax.Array:
    """`put_tensor` where every device has a part of every piece: joined on the devices.

    Until they are joined their parts of this tensor take twice their memory.
    """
    whole = Shards(weights.specs[name].shape, dtype, sharding)
    pieces = []
    for box, part in _parts(weights, name, dtype, whole):
        piece = Shards((len(part), *whole.shape[1:]), dtype, sharding, copied=True)
        piece.write((slice(0, len(part)), *box[1:]), part)
        del part
        pieces.append(piece.finish())
    return _join(sharding)(pieces)


class Shards:
    """The parts of one array, no scalar, that devices of this process hold, filled row by row.

    A part is sent to its devices as soon as it is complete; it is `copied` even where they have
    the same memory, or the first of them takes it over.
    """

    def __init__(
        self, shape: SourceShape, dtype: np.dtype, sharding: NamedSharding, *, copied: bool = False
    ):
        self.shape = shape
        self._dtype = dtype
        self._sharding = sharding
        self._copied = copied
        self._devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            ends = (i.indices(n)[:2] for i, n in zip(index or (), shape, strict=True))
            self._devices.setdefault(tuple(ends), []).append(device)
        self._open: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        self._sent: list[jax.Array] = []

    def box(self, start: int, stop: int) -> Box | None:
        """The smallest with all that is wanted of these rows; None if nothing is."""
        found = [
            (rows, *ends[1:])
            for ends in self._devices
            if (rows := _common(ends, start, stop)) is not None
        ]
        sides = zip(*found, strict=True)
        box = tuple(slice(min(e[0] for e in side), max(e[1] for e in side)) for side in sides)
        return box or None

    def write(self, box: Box, part: np.ndarray) -> None:
        """What lies in a box; boxes come row after row."""
        for ends, devices in self._devices.items():
            rows = _common(ends, box[0].start, box[0].stop)
            if rows is None:
                continue
            if ends not in self._open:
                self._open[ends] = aligned_empty(tuple(b - a for a, b in ends), self._dtype)
            sides = zip((rows, *ends[1:]), box, strict=True)
            inner = tuple(_less(slice(*own), side.start) for own, side in sides)
            self._open[ends][_less(slice(*rows), ends[0][0])] = part[inner]
            if rows[1] == ends[0][1]:
                self._send(self._open.pop(ends), devices)

    def finish(self) -> jax.Array:
        """The array, of all devices of all processes."""
        return jax.make_array_from_single_device_arrays(
            self.shape, self._sharding, self._sent, dtype=self._dtype
        )

    def _send(self, part: np.ndarray, devices: list[Any]) -> None:
        for number, device in enumerate(devices):
            # No two devices may share memory: each may give its own away.
            taken = device.platform == "cpu" and (number > 0 or self._copied)
            sent = jnp.array(part, device=device) if taken else jax.device_put(part, device)
            self._sent.append(sent)


def _parts(
    weights: Weights, name: str, dtype: np.dtype, shards: Shards
) -> Iterator[tuple[Box, np.ndarray]]:
    """What this process wants of each piece: its box, and what lies in it."""
    boxes: list[Box | None] = []
    inner: list[Box | None] = []  # of the piece itself
    places = piece_places(name, shards.shape)
    for place in places:
        if isinstance(place, int):
            box = shards.box(place, place + 1)
            inner.append(box and box[1:])
        else:
            rows = slice(0, shards.shape[0]) if place is ... else place
            box = shards.box(rows.start, rows.stop)
            inner.append(box and (_less(box[0], rows.start), *box[1:]))
        boxes.append(box)
    found = read_boxes(weights, name, inner, dtype)
    for place, box, part in zip(places, boxes, found, strict=True):
        if box is not None and part is not None:
            yield box, part[None] if isinstance(place, int) else part
        del part


def _common(ends: tuple[tuple[int, int], ...], start: int, stop: int) -> tuple[int, int] | None:
    low, high = max(ends[0][0], start), min(ends[0][1], stop)
    return (low, high) if low < high else None


def _less(rows: slice, by: int) -> slice:
    return slice(rows.start - by, rows.stop - by)


def _share_memory(sharding: NamedSharding) -> bool:
    """Whether devices take over arrays of the host as they are."""
    return all(device.platform == "cpu" for device in sharding.device_set)


@functools.lru_cache(64)
def _join(sharding: NamedSharding) -> Any:
    return jax.jit(lambda parts: jnp.concatenate(parts), out_shardings=sharding)


@runtime_checkable
class Places(Protocol):
    """What takes arrays by their paths in the model."""

    def put(self, path: str, array: Any) -> jax.Array:
        """One that is at hand, or on other devices."""
        ...

    def read(self, weights: Weights, path: str, dtype: np.dtype) -> jax.Array:
        """One that has the same path in a file."""
        ...


class DefaultDevice:
    """All on one device, on a CPU without a copy."""

    def put(self, path: str, array: Any) -> jax.Array:
        """See `Places`."""
        return jax.device_put(array)

    def read(self, weights: Weights, path: str, dtype: np.dtype) -> jax.Array:
        """See `Places`."""
        return jax.device_put(read_tensor(weights, path, dtype))


class OverMesh:
    """Each device its own shard, by `models.sharding.RULES`; of one process's devices."""

    def __init__(self, model: nnx.Module, mesh: Mesh):
        """`model` is one of shapes, as it is to be."""
        self._shardings: Mapping[str, NamedSharding] = shardings(split_model(model)[1], mesh)

    def put(self, path: str, array: Any) -> jax.Array:
        """See `Places`."""
        if isinstance(array, np.ndarray):
            return put(array, self._shardings[path])
        return jax.device_put(array, self._shardings[path])

    def read(self, weights: Weights, path: str, dtype: np.dtype) -> jax.Array:
        """See `Places`."""
        return put_tensor(weights, path, dtype, self._shardings[path])


def load_unrolled(
    checkpoint: Checkpoint,
    config: PaliGemmaConfig,
    dtype: DTypeLike,
    *,
    quantization: Quantization | str | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> PaliGemma:
    """The model with its layers one by one, its floats and activations of `dtype`.

    `config` may have another resolution than the checkpoint's; position embeddings are resampled
    then. `quantization` quantizes floats one by one, as they are read; weights that are stored
    quantized go where they stay as they are. Peak memory is that of the model and of one layer's
    largest parameter. On a `mesh`, which has all three axes, no device ever holds more than its
    shards,
    one rounded parameter on its way to the others apart. Raises CheckpointError, and ConfigError
    for an unknown quantization.
    """
    weights = cast_floats(checkpoint, as_float_dtype(dtype))
    formats = checkpoint.quantization
    if quantization is not None and formats is None:
        formats = QuantizationConfig.of(quantization)
        weights = RoundedWeights(weights, formats)
    model = abstract_unstacked(config, dtype)
    few_bits: dict[str, QuantizedParam] = {}
    if formats is not None:
        few_bits = {r.target.paths[0]: r for r in quantized_params(config, formats)}
        model = abstract_quantized(model, formats)
    places = DefaultDevice() if mesh is None else OverMesh(model, mesh)
    arrays = dict(_arrays(weights, config, few_bits, places, progress))
    return split_model(model)[0].merge_flat(arrays)


def _arrays(
    weights: Weights,
    config: PaliGemmaConfig,
    few_bits: dict[str, QuantizedParam],
    places: Places,
    progress: Progress | None,
) -> Iterator[tuple[str, jax.Array]]:
    """Every parameter of the unrolled form by its path, read when asked for, the largest first.

    Each is written where it stays, layer by layer: no stacked parameter is ever in memory.
    """
    done, total = 0, sum(spec.nbytes for spec in weights.specs.values())
    for target in sorted(
        unstacked_params(config), key=lambda t: -math.prod(t.shape) * (t.depth or 1)
    ):
        rounded = few_bits.get(target.paths[0])
        paths = [piece.path for piece in target.pieces]
        if rounded is not None:
            paths = [rounded.values, rounded.scale]
        if progress:
            progress(paths[0], done, total)
        if rounded is not None:
            yield from _few_bits_of(weights, rounded, places)
        elif paths == [POSITIONS]:
            array = read_tensor(weights, POSITIONS, weights.specs[POSITIONS].dtype)
            array = resample_position_embeddings(array, config.img.num_patches)
            yield POSITIONS, places.put(POSITIONS, array)
        else:
            yield from _layers_of(weights, target, places)
        done += sum(weights.specs[path].nbytes for path in paths)
    if progress:
        progress("", done, total)


def _layers_of(
    weights: Weights, target: UnstackedParam, places: Places
) -> Iterator[tuple[str, jax.Array]]:
    dtype = weights.specs[target.pieces[0].path].dtype
    if target.depth is None:
        (path,) = target.paths
        yield path, places.read(weights, path, dtype)
        return
    layers = zip(*(weights.pieces(piece.path, dtype) for piece in target.pieces), strict=True)
    for path, fills in zip(target.paths, layers, strict=True):
        array = aligned_empty(target.shape, dtype)
        for piece, copy in zip(target.pieces, fills, strict=True):
            copy(piece.view(array))
        yield path, places.put(path, array)


def _few_bits_of(
    weights: Weights, rounded: QuantizedParam, places: Places
) -> Iterator[tuple[str, jax.Array]]:
    names = (rounded.values, rounded.scale)
    if rounded.target.depth is None:
        layers = iter([read_together(weights, names)])
    else:
        layers = read_pieces(weights, names)
    for owner, arrays in zip(rounded.owners, layers, strict=True):
        values, scale = map(jax.device_put, arrays)
        del arrays
        for name, array in (("values", rounded.on_device(values, scale)), ("scale", scale)):
            yield f"{owner}/matrix/{name}", places.put(f"{owner}/matrix/{name}", array)
