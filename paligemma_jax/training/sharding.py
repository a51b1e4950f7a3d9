"""Where a run lies on many devices: its weights by `models.sharding`, everything like them too.

Rows of a batch are split over the axes "data" and "fsdp". Gradients, moments and averages lie as
the weights they belong to.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paligemma_jax.models.mesh import DATA as DATA
from paligemma_jax.models.mesh import FSDP as FSDP
from paligemma_jax.models.mesh import TENSOR as TENSOR
from paligemma_jax.models.mesh import AnyMesh as AnyMesh
from paligemma_jax.models.mesh import Axes as Axes
from paligemma_jax.models.mesh import make_mesh as make_mesh
from paligemma_jax.models.path_rules import Rules
from paligemma_jax.models.sharding import RULES as RULES
from paligemma_jax.models.sharding import Fsdp as Fsdp
from paligemma_jax.models.sharding import Layouts, shardings
from paligemma_jax.models.sharding import leaf_sharding as leaf_sharding
from paligemma_jax.processing.batch import Batch
from paligemma_jax.training.state import TrainState


def state_shardings(state: TrainState, mesh: AnyMesh, rules: Rules[Layouts] = RULES) -> TrainState:
    """A `TrainState` of shardings for a state of arrays or shapes; moments lie as their weights."""

    def of(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in keys if isinstance(getattr(key, "key", None), str)]
        return leaf_sharding(names[-1] if names else "", leaf, mesh, rules)

    found = jax.tree_util.tree_map_with_path(of, dataclasses.replace(state, frozen=None))
    return dataclasses.replace(found, frozen=shardings(state.frozen, mesh, rules))


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Rows over "data" and "fsdp", everything else whole."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows as its part of one batch of all processes, on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def place_state(state: TrainState, shardings: TrainState) -> TrainState:
    """The state, the same in every process, on the devices."""

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, state, shardings)
