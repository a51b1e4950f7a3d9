"""Where weights lie on a mesh: rules by parameter path, for models in every form.

The rules are those of `RULES`: heads, the MLP and rows of the token table over "tensor"; what is
left of each large weight over "fsdp". An axis that a mesh axis does not divide is not split
over it. XLA makes the communication of it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paligemma_jax.models.mesh import FSDP, TENSOR, AnyMesh
from paligemma_jax.models.path_rules import Rules
from paligemma_jax.models.skeleton import take_apart

Spec = list[str | None]  # the mesh axis that each axis of an array is split over
_VALUES, _SCALE = "/matrix/values", "/matrix/scale"  # of a matrix of few bits


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
    """Split along one given axis of the array, counted from the last, -1.

    As it was where the mesh axis does not divide it, or splits another one already.
    """

    dim: int
    axis: str = TENSOR

    def split(self, shape: tuple[int, ...], nbytes: int, mesh: AnyMesh, spec: Spec) -> Spec:
        """See `Layout`."""
        size, place = mesh.shape[self.axis], len(shape) + self.dim
        if size == 1 or place < 0 or shape[place] % size or spec[place] or self.axis in spec:
            return spec
        return [self.axis if i == place else used for i, used in enumerate(spec)]


Layouts = tuple[Layout, ...]

# Heads and MLP columns over "tensor", one way in and the other way out, so that each layer adds up
# twice; the token table by rows. What is left of each over "fsdp". Layers are stacked, or have a
# number each and queries, keys and values (or both gates) in one weight: where their heads do not
# come out even, inputs are split. Matrices of few bits are [outputs, inputs].
RULES: Rules[Layouts] = Rules(
    (
        (r"llm/layers/attn/(q|kv|attn_vec)_einsum/w", (Split(-3), Fsdp())),
        (r"llm/layers/mlp/gating_einsum/w", (Split(-1), Fsdp())),
        (r"llm/layers/mlp/linear/w", (Split(-2), Fsdp())),
        (r"llm/layers/\d+/attn/qkv/w", (Split(-3), Split(-1), Fsdp())),
        (r"llm/layers/\d+/attn/out/w", (Split(-2), Fsdp())),
        # Both gates by what goes in: their columns are multiplied as one matrix [2 * F, W], and XLA
        # would gather it where F is split.
        (r"llm/layers/\d+/mlp/(gate_up|down)/w", (Split(-1), Fsdp())),
        (
            rf"llm/layers/.*(q_einsum|kv_einsum|qkv|gating_einsum|gate_up){_VALUES}",
            (Split(-2), Split(-1), Fsdp()),
        ),
        (
            rf"llm/layers/.*(attn_vec_einsum|attn/out|linear|down){_VALUES}",
            (Split(-1), Split(-2), Fsdp()),
        ),
        (rf"llm/(embedder/input_embedding|lm_head/w|.*{_VALUES})", (Split(-2), Fsdp())),
        (r"img/blocks/(\d+/)?attn/[qkv]/(kernel|bias)", (Split(-2), Fsdp())),
        (r"img/blocks/(\d+/)?attn/out/kernel", (Split(-3), Fsdp())),
        (r"img/blocks/(\d+/)?mlp/fc1/(kernel|bias)", (Split(-1), Fsdp())),
        (r"img/blocks/(\d+/)?mlp/fc2/kernel", (Split(-2), Fsdp())),
        (rf"img/blocks/.*(attn/[qkv]|mlp/fc1){_VALUES}", (Split(-2), Fsdp())),
        (rf"img/blocks/.*(attn/out|mlp/fc2){_VALUES}", (Split(-1), Fsdp())),
        (r".*", (Fsdp(),)),
    )
)


def leaf_sharding(
    path: str, leaf: Any, mesh: AnyMesh, rules: Rules[Layouts] = RULES, groups: int = 1
) -> NamedSharding:
    """Of an array (or shape) that belongs to the parameter `path`.

    Inputs in `groups` that share a scale are split between groups only.
    """
    shape = (*leaf.shape[:-1], groups) if groups > 1 else tuple(leaf.shape)
    spec: Spec = [None] * len(shape)
    nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    for layout in rules.first(path, default=(Replicate(),)):
        spec = layout.split(shape, nbytes, mesh, spec)
    return _named(mesh, spec)


def shardings(
    leaves: Mapping[str, Any], mesh: AnyMesh, rules: Rules[Layouts] = RULES
) -> dict[str, NamedSharding]:
    """Of all parameters, arrays or shapes by their paths; scales lie with what they scale."""
    found: dict[str, NamedSharding] = {}
    for path, leaf in leaves.items():
        owner = path.removesuffix(_VALUES)
        if owner == path:
            if not path.endswith(_SCALE):
                found[path] = leaf_sharding(path, leaf, mesh, rules)
            continue
        groups = leaves[f"{owner}{_SCALE}"].shape[-1]
        values = leaf_sharding(path, leaf, mesh, rules, groups)
        spec: Spec = [*values.spec, *[None] * (leaf.ndim - len(values.spec))]
        found[path] = values
        found[f"{owner}{_SCALE}"] = values if groups > 1 else _named(mesh, [*spec[:-1], None])
    return found


def shard_model(model: nnx.Module, mesh: Mesh, rules: Rules[Layouts] = RULES) -> Any:
    """The model, in whatever form, with its weights on the devices of a mesh."""
    skeleton, arrays = take_apart(model)
    places = shardings(arrays, mesh, rules)
    return skeleton.fill({path: jax.device_put(x, places[path]) for path, x in arrays.items()})


def _named(mesh: AnyMesh, spec: Spec) -> NamedSharding:
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return NamedSharding(mesh, PartitionSpec(*spec))
