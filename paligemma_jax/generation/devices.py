"""A model on several devices: whole on each of them, or split over a mesh."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.sharding import DATA, FSDP, NAMES, Axes, make_mesh, shard_model


def on_devices(model: PaliGemma, devices: Sequence[Any] | None = None) -> PaliGemma:
    """The model with its weights whole on each device; all of this process if none are named.

    Batches are then split among them, where their number divides the batch size (which is filled
    up to powers of two). Results are those of one device. On one device nothing changes. Raises
    ConfigError for no devices.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    if not devices:
        raise ConfigError(
            "expected at least one device, got none. Call on_devices(model, jax.local_devices())"
        )
    if len(devices) == 1:
        return model
    return shard_model(model, make_mesh(Axes(data=-1), devices))


def batch_shards(model: PaliGemma) -> int:
    """How many parts a batch is split into."""
    mesh = _mesh_of(model)
    return 1 if mesh is None else mesh.shape[DATA] * mesh.shape[FSDP]


def batch_placement(model: PaliGemma) -> Callable[[Any], jax.Array]:
    """What puts an array [B, ...] where the model expects it.

    For a model on a mesh B goes over the axes "data" and "fsdp", as far as it divides.
    """
    mesh = _mesh_of(model)
    if mesh is None:
        return jnp.asarray

    def place(array: Any) -> jax.Array:
        axes: list[str] = []
        ways = 1
        for name in (DATA, FSDP):
            if array.shape[0] % (ways * mesh.shape[name]) == 0:
                axes.append(name)
                ways *= mesh.shape[name]
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(tuple(axes))))

    return place


def _mesh_of(model: PaliGemma) -> Mesh | AbstractMesh | None:
    first = next(iter(jax.tree.leaves(model)), None)
    lies = getattr(first, "sharding", None)
    if not isinstance(lies, NamedSharding) or lies.mesh.axis_names != NAMES:
        return None
    return lies.mesh
