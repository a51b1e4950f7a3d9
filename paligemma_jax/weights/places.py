"""Where the arrays of a model go as they are read: to one device, or over a mesh."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from paligemma_jax.models.sharding import shardings
from paligemma_jax.models.skeleton import take_apart
from paligemma_jax.weights.on_mesh import put, put_tensor
from paligemma_jax.weights.source import Weights, read_tensor


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
        self._shardings: Mapping[str, NamedSharding] = shardings(take_apart(model)[1], mesh)

    def put(self, path: str, array: Any) -> jax.Array:
        """See `Places`."""
        if isinstance(array, np.ndarray):
            return put(array, self._shardings[path])
        return jax.device_put(array, self._shardings[path])

    def read(self, weights: Weights, path: str, dtype: np.dtype) -> jax.Array:
        """See `Places`."""
        return put_tensor(weights, path, dtype, self._shardings[path])
