"""Where arrays lie on many devices: one mesh, and rules by parameter path.

Rows of a batch are split over the axes "data" and "fsdp"; weights and everything shaped like them
(gradients, moments, averages) over "fsdp" and "tensor" as the rules say. XLA makes the rest.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.batch import Batch
from paligemma_jax.training.state import TrainState
from paligemma_jax.training.trainable import Rules

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AnyMesh = Mesh | AbstractMesh  # the second of devices that need not be there
Spec = list[str | None]  # the mesh axis that each axis of an array is split over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """Sizes of the mesh; one of them may be -1, for all devices that are left."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """In the order of the mesh."""
        return self.data, self.fsdp, self.tensor


def make_mesh(axes: Axes, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices of all processes, or over the given ones."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = list(axes.sizes)
    known = math.prod(size for size in sizes if size != -1)
    fits = sizes.count(-1) <= 1 and known > 0 and len(devices) % known == 0
    sizes = [len(devices) // known if fits and size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices) or not fits:
        raise ConfigError(
            f"A mesh of data={axes.data}, fsdp={axes.fsdp}, tensor={axes.tensor} does not go with "
            f"{len(devices)} devices. Sizes whose product is {len(devices)} fit, one of them -1 "
            "for what is left. Write Axes(fsdp=-1)"
        )
    return Mesh(np.array(devices).reshape(sizes), (DATA, FSDP, TENSOR))


@runtime_checkable
class Layout(Protocol):
    """How an array is split."""

    def split(self, shape: tuple[int, ...], nbytes: int, mesh: AnyMesh, spec: Spec) -> Spec:
        """`spec` with more axes split, where they can be."""
        ...


@dataclasses.dataclass(frozen=True)
class Replicate:
    """Whole on every device."""

    def split(self, shape: tuple[int, ...], nbytes: int, mesh: AnyMesh, spec: Spec) -> Spec:
        """See `Layout`."""
        return spec


@dataclasses.dataclass(frozen=True)
class Fsdp:
    """big_vision's rule: small arrays stay whole, others are split along their largest axis.

    Of the axes not split yet, the largest that the mesh axis divides; none, and it stays as it is.
    """

    axis: str = FSDP
    small: int = 4 << 20  # bytes

    def split(self, shape: tuple[int, ...], nbytes: int, mesh: AnyMesh, spec: Spec) -> Spec:
        """See `Layout`."""
        size = mesh.shape[self.axis]
        free = [i for i, n in enumerate(shape) if spec[i] is None and n % size == 0]
        if size == 1 or nbytes <= self.small or not free:
            return spec
        best = max(free, key=lambda i: shape[i])
        return [self.axis if i == best else used for i, used in enumerate(spec)]


@dataclasses.dataclass(frozen=True)
class Split:
    """Split along one given axis of the array, if the mesh axis divides it."""

    dim: int
    axis: str = TENSOR

    def split(self, shape: tuple[int, ...], nbytes: int, mesh: AnyMesh, spec: Spec) -> Spec:
        """See `Layout`."""
        size = mesh.shape[self.axis]
        if size == 1 or self.dim >= len(shape) or shape[self.dim] % size or spec[self.dim]:
            return spec
        return [self.axis if i == self.dim else used for i, used in enumerate(spec)]


Layouts = tuple[Layout, ...]

# Heads and MLP columns over "tensor", one way in and the other way out, so that each layer adds up
# twice; the token table by rows. What is left of each over "fsdp".
RULES: Rules[Layouts] = Rules(
    (
        (r"llm/layers/attn/(q|attn_vec)_einsum/w", (Split(1), Fsdp())),
        (r"llm/layers/attn/kv_einsum/w", (Split(2), Fsdp())),
        (r"llm/layers/mlp/gating_einsum/w", (Split(3), Fsdp())),
        (r"llm/layers/mlp/linear/w", (Split(1), Fsdp())),
        (r"llm/(embedder/input_embedding|lm_head/w)", (Split(0), Fsdp())),
        (r"img/blocks/attn/[qkv]/kernel", (Split(2), Fsdp())),
        (r"img/blocks/attn/[qkv]/bias|img/blocks/attn/out/kernel", (Split(1), Fsdp())),
        (r"img/blocks/mlp/fc1/kernel", (Split(2), Fsdp())),
        (r"img/blocks/mlp/fc1/bias|img/blocks/mlp/fc2/kernel", (Split(1), Fsdp())),
        (r".*", (Fsdp(),)),
    )
)


def leaf_sharding(
    path: str, leaf: Any, mesh: AnyMesh, rules: Rules[Layouts] = RULES
) -> NamedSharding:
    """Of an array (or shape) that belongs to the parameter `path`."""
    spec: Spec = [None] * len(leaf.shape)
    nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    for layout in rules.first(path, default=(Replicate(),)):
        spec = layout.split(tuple(leaf.shape), nbytes, mesh, spec)
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def state_shardings(state: TrainState, mesh: AnyMesh, rules: Rules[Layouts] = RULES) -> TrainState:
    """A `TrainState` of shardings for a state of arrays or shapes; moments lie as their weights."""

    def of(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in keys if isinstance(getattr(key, "key", None), str)]
        return leaf_sharding(names[-1] if names else "", leaf, mesh, rules)

    return jax.tree_util.tree_map_with_path(of, state)


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
