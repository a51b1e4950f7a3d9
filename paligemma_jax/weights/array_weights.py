"""Arrays at hand as `Weights`, wherever JAX keeps them."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.source import Fill, TensorSpec, fill_from, piece_places


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
