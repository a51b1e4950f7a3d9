"""Arrays at hand as `Weights`, wherever JAX keeps them."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.source import Fill, TensorSpec, fill_from, piece_places


class ArrayWeights:
    """Parameters by their paths, layers stacked, as numpy or JAX arrays; see `Weights`.

    Arrays of several processes are gathered one by one: all of them must read the same in the same
    order.
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
        elsewhere = isinstance(array, jax.Array) and array.is_fully_addressable
        if not elsewhere or _is_at_hand(array):
            array = to_host(array)
        for place in piece_places(name, self.specs[name].shape):
            part = array[place] if isinstance(array, np.ndarray) else _fetch(array, place)
            yield fill_from(part)


def to_host(array: Any) -> np.ndarray:
    """The whole array in every process; on a CPU without a copy."""
    if isinstance(array, jax.Array) and array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _is_at_hand(array: jax.Array) -> bool:
    devices = array.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _fetch(array: jax.Array, place: Any) -> np.ndarray:
    """One piece, from the devices that have a part of it."""
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
