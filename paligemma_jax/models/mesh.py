"""The devices that arrays are split over: a mesh of three axes, of which most have size 1.

Rows of a batch go over "data" and "fsdp", weights over "fsdp" and "tensor".
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from paligemma_jax.errors import ConfigError

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
NAMES = (DATA, FSDP, TENSOR)
AnyMesh = Mesh | AbstractMesh  # the second of devices that need not be there


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
    """The mesh over all devices of all processes, or over the given ones; raises ConfigError."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = list(axes.sizes)
    known = math.prod(size for size in sizes if size != -1)
    fits = sizes.count(-1) <= 1 and known > 0 and len(devices) % known == 0
    sizes = [len(devices) // known if fits and size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices) or not fits:
        raise ConfigError(
            f"A mesh of data={axes.data}, fsdp={axes.fsdp}, tensor={axes.tensor} does not go with "
            f"{len(devices)} devices. Sizes whose product is {len(devices)} fit, one of them -1 "
            "for what is left. Write Axes(fsdp=-1), on the command line --mesh fsdp=-1 "
            "(in training --config.mesh='Axes(fsdp=-1)')"
        )
    return Mesh(np.array(devices).reshape(sizes), NAMES)


def with_all_axes(mesh: Mesh) -> Mesh:
    """The same devices on a mesh that has the three axes in their order, for XLA to split over.

    Raises ConfigError for axes of other names.
    """
    unknown = [name for name in mesh.axis_names if name not in NAMES]
    if unknown:
        raise ConfigError(
            f"Nothing is split over the axis {', '.join(map(str, unknown))} of a mesh. Axes named "
            "data, fsdp and tensor fit, each as large as you like. Write "
            "jax.make_mesh((4,), ('tensor',)), or Axes(tensor=4)."
        )
    order = [mesh.axis_names.index(name) for name in NAMES if name in mesh.axis_names]
    sizes = [mesh.shape.get(name, 1) for name in NAMES]
    return Mesh(mesh.devices.transpose(order).reshape(sizes), NAMES)


def local_mesh(mesh: Mesh | Axes) -> Mesh:
    """`with_all_axes` of a mesh, or one of all devices; raises ConfigError for other processes'."""
    found = make_mesh(mesh) if isinstance(mesh, Axes) else with_all_axes(mesh)
    foreign = sum(d.process_index != jax.process_index() for d in found.devices.flat)
    if foreign:
        raise ConfigError(
            f"{foreign} of {found.size} devices of the mesh belong to other processes, which would "
            "have to be asked the same at the same time. Devices of this process fit. Write "
            "Mesh(np.array(jax.local_devices()), ('tensor',))"
        )
    return found
