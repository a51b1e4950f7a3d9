"""Compiles for a GPU that is not there: XLA only needs its description.

Needs jax's CUDA plugin and NVIDIA's assembler, but neither driver nor cuDNN nor cuBLAS. Nothing is
tuned by measurement, so what comes out is for reading and not for timing.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from paligemma_jax.models import layers as backend
from tests.program.hlo import Program

H200 = Path(__file__).parent / "h200.txtpb"


def why_not() -> str | None:
    """What is missing here to compile for a GPU; None if nothing."""
    jaxlib = importlib.metadata.version("jaxlib")
    for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        if _version(name) != jaxlib:
            return f"{name}=={jaxlib} is not installed"
    for name in ("nvidia-cuda-nvcc", "nvidia-nvvm"):
        if _version(name) is None:
            return f"{name} is not installed"
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class Target:
    """A GPU to compile for."""

    def __init__(self, description: Path = H200):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # asks for the driver
        topology = topologies.get_topology_desc(
            description.stem,
            platform="cuda",
            target_config=description.read_text(),
            topology="1x1x1",
        )
        self._sharding = SingleDeviceSharding(topology.devices[0])

    def shapes(self, tree: Any) -> Any:
        """The same tree of shapes (or arrays), placed on the GPU."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding), tree
        )

    def compile(self, jitted: Any, *args: Any, **static: Any) -> "Compiled":
        """The program of a jitted function for shapes `args`, as users run it."""
        with as_on_a_gpu():
            lowered = jitted.lower(*self.shapes(args), **static)
            return Compiled(lowered.compile())


class Compiled:
    """A program and its memory; sizes in bytes."""

    def __init__(self, compiled: Any):
        self.program = Program(compiled.as_text())
        memory = compiled.memory_analysis()
        self.temporaries: int = memory.temp_size_in_bytes
        self.aliased: int = memory.alias_size_in_bytes
        self.arguments: int = memory.argument_size_in_bytes


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Undoes what the tests set for CPUs; code that asks for the backend is told "gpu"."""
    unoptimised = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # traces remember what they were told
    try:
        with (
            jax.default_matmul_precision("default"),
            mock.patch.object(backend, "backend", lambda: "gpu"),
        ):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", unoptimised)
        jax.clear_caches()
