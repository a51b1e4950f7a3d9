"""Arrays at hand as `Weights`, wherever JAX keeps them."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.arrays import copy_into
from paligemma_jax.weights.source import Fill, TensorSpec, piece_places


class ArrayWeights:
    """Parameters by their paths, layers stacked, as numpy or JAX arrays; see `Weights`.

    Arrays of several processes are gathered piece by piece: then all of them must read the same
    pieces in the same order.
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
        if not isinstance(array, jax.Array) or _is_at_hand(array):
            array = np.asarray(array)
        for place in piece_places(name, self.specs[name].shape):
            yield functools.partial(_copy, to_host(_cut(array, place)))


def to_host(array: Any) -> np.ndarray:
    """The whole array in every process; on a CPU without a copy."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _is_at_hand(array: jax.Array) -> bool:
    devices = array.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _cut(array: Any, place: Any) -> Any:
    if isinstance(array, np.ndarray) or place is ...:
        return array[place]
    if isinstance(place, slice):  # places are no constants of the program: it is compiled once
        size = place.stop - place.start
        return jax.lax.dynamic_slice_in_dim(array, place.start, size)
    return jax.lax.dynamic_index_in_dim(array, place, keepdims=False)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    copy_into(target, source)
