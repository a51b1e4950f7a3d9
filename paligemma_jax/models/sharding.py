"""Where weights lie on a mesh of devices: rules by parameter path, for models in every form.

Sequences of a batch go over the axes "data" and "fsdp", weights over "fsdp" and "tensor". The first
regular expression that matches a whole path decides, as in big_vision's rules for schedules,
learning rate multipliers and weight decay. XLA makes the communication of it.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paligemma import split_model

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
            f"Expected mesh sizes whose product is {len(devices)}, the number of devices available "
            f"(-1 for what is left), got data={axes.data}, fsdp={axes.fsdp}, tensor={axes.tensor}. "
            "Write Axes(fsdp=-1), on the command line --mesh fsdp=-1 (in training "
            "--config.mesh='Axes(fsdp=-1)')"
        )
    return Mesh(np.array(devices).reshape(sizes), NAMES)


def with_all_axes(mesh: Mesh) -> Mesh:
    """The same devices on a mesh that has the three axes in their order, for XLA to split over.

    Raises ConfigError for axes of other names.
    """
    unknown = [name for name in mesh.axis_names if name not in NAMES]
    if unknown:
        raise ConfigError(
            f"Expected mesh axes named data, fsdp and tensor, got "
            f"{', '.join(map(str, unknown))}. Write Axes(tensor=4)."
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
            f"Expected a mesh of this process' devices, got {foreign} of {found.size} that belong "
            "to other processes. Write Mesh(np.array(jax.local_devices()), ('tensor',))"
        )
    return found


Value = TypeVar("Value", covariant=True)


@dataclasses.dataclass(frozen=True)
class Rules(Generic[Value]):
    """Pairs of a regular expression over paths such as "llm/layers/attn/q_einsum/w" and a value."""

    rules: tuple[tuple[str, Value], ...]

    def cover(self, paths: Iterable[str], what: str) -> dict[str, Value]:
        """The value of every path; `what` names the rules in errors.

        Raises ConfigError, listing every problem at once, if a path has no rule or if a rule
        matches no path at all.
        """
        paths = list(paths)
        found = self.find(paths, what)
        missing = [path for path in paths if path not in found]
        if missing:
            shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            raise ConfigError(
                f"{what} has no rule for {len(missing)} of {len(paths)} parameters: {shown}. Add a "
                'last rule such as (".*", None), which freezes the rest.'
            )
        return found

    def find(self, paths: Iterable[str], what: str) -> dict[str, Value]:
        """The value of every path that has one; ConfigError if a rule matches no path at all."""
        paths = list(paths)
        patterns = [self._compile(pattern, what) for pattern, _ in self.rules]
        idle = [p.pattern for p in patterns if not any(p.fullmatch(path) for path in paths)]
        if idle:
            hints = ", ".join(repr(pattern) + _suggest(pattern, paths) for pattern in idle)
            raise ConfigError(
                f"{what} has rules that match no parameter: {hints}. A rule must match a whole "
                'path, such as "llm/layers/attn/.*". List the paths: paligemma info CHECKPOINT'
            )
        found = {}
        for path in paths:
            for pattern, (_, value) in zip(patterns, self.rules, strict=True):
                if path not in found and pattern.fullmatch(path):
                    found[path] = value
        return found

    def first(self, path: str, default: Any) -> Any:
        """The value of the first rule that matches `path`, or `default`."""
        return next((v for pattern, v in self.rules if re.fullmatch(pattern, path)), default)

    @staticmethod
    def _compile(pattern: str, what: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except re.error as e:
            raise ConfigError(
                f"{what} has the rule {pattern!r}, which is no regular expression ({e}). Write for "
                'example "img/.*"'
            ) from e


def _suggest(pattern: str, paths: list[str]) -> str:
    """' (did you mean ...?)' with the nearest path that has a part like the pattern's."""
    near = difflib.get_close_matches(pattern.replace(".*", ""), paths, n=1, cutoff=0.3)
    return f" (the nearest path is {near[0]!r})" if near else ""


Spec = list[str | None]  # the mesh axis that each axis of an array is split over
_VALUES, _SCALE = "/matrix/values", "/matrix/scale"  # of a quantized matrix
MIN_BYTES = 4 << 20  # arrays of at most so many are not split over "fsdp"

# Which axis of an array, counted from the last, -1, is split over "tensor": the first of these that
# the mesh axis divides. Heads and MLP columns, one way in and the other way out, so that each layer
# adds up twice; the embedding table by rows. What is left of each large array goes over "fsdp", as
# in big_vision. Layers are stacked, or have a number each and queries, keys and values (or both
# gates) in one weight: where their heads do not come out even, inputs are split. Quantized matrices
# are [outputs, inputs].
RULES: Rules[tuple[int, ...]] = Rules(
    (
        (r"llm/layers/attn/(q|kv|attn_vec)_einsum/w", (-3,)),
        (r"llm/layers/mlp/gating_einsum/w", (-1,)),
        (r"llm/layers/mlp/linear/w", (-2,)),
        (r"llm/layers/\d+/attn/qkv/w", (-3, -1)),
        (r"llm/layers/\d+/attn/out/w", (-2,)),
        # Both gates by what goes in: their columns are multiplied as one matrix [2 * F, W], and XLA
        # would gather it where F is split.
        (r"llm/layers/\d+/mlp/(gate_up|down)/w", (-1,)),
        (rf"llm/layers/.*(q_einsum|kv_einsum|qkv|gating_einsum|gate_up){_VALUES}", (-2, -1)),
        (rf"llm/layers/.*(attn_vec_einsum|attn/out|linear|down){_VALUES}", (-1, -2)),
        (rf"llm/(embedder/input_embedding|lm_head/w|.*{_VALUES})", (-2,)),
        (r"img/blocks/(\d+/)?attn/[qkv]/(kernel|bias)", (-2,)),
        (r"img/blocks/(\d+/)?attn/out/kernel", (-3,)),
        (r"img/blocks/(\d+/)?mlp/fc1/(kernel|bias)", (-1,)),
        (r"img/blocks/(\d+/)?mlp/fc2/kernel", (-2,)),
        (rf"img/blocks/.*(attn/[qkv]|mlp/fc1){_VALUES}", (-2,)),
        (rf"img/blocks/.*(attn/out|mlp/fc2){_VALUES}", (-1,)),
    )
)


def leaf_sharding(path: str, leaf: Any, mesh: AnyMesh, groups: int = 1) -> NamedSharding:
    """Of an array (or shape) that belongs to the parameter `path`.

    Inputs in `groups` that share a scale are split between groups only.
    """
    shape = (*leaf.shape[:-1], groups) if groups > 1 else tuple(leaf.shape)
    spec: Spec = [None] * len(shape)
    tensor, fsdp = mesh.shape[TENSOR], mesh.shape[FSDP]
    if tensor > 1:
        for axis in RULES.first(path, default=()):
            if len(shape) + axis >= 0 and shape[axis] % tensor == 0 and TENSOR not in spec:
                spec[axis] = TENSOR
    nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    free = [i for i, n in enumerate(shape) if spec[i] is None and n % fsdp == 0]
    if fsdp > 1 and nbytes > MIN_BYTES and free:
        spec[max(free, key=lambda i: shape[i])] = FSDP
    return _named(mesh, spec)


def shardings(leaves: Mapping[str, Any], mesh: AnyMesh) -> dict[str, NamedSharding]:
    """Of all parameters, arrays or shapes by their paths; scales lie with what they scale."""
    found: dict[str, NamedSharding] = {}
    for path, leaf in leaves.items():
        owner = path.removesuffix(_VALUES)
        if owner == path:
            if not path.endswith(_SCALE):
                found[path] = leaf_sharding(path, leaf, mesh)
            continue
        groups = leaves[f"{owner}{_SCALE}"].shape[-1]
        values = leaf_sharding(path, leaf, mesh, groups)
        spec: Spec = [*values.spec, *[None] * (leaf.ndim - len(values.spec))]
        found[path] = values
        found[f"{owner}{_SCALE}"] = values if groups > 1 else _named(mesh, [*spec[:-1], None])
    return found


def shard_model(model: nnx.Module, mesh: Mesh) -> Any:
    """The model, in whatever form, with its weights on the devices of a mesh."""
    graphdef, arrays = split_model(model)
    own = shardings(arrays, mesh)
    return graphdef.merge_flat({path: jax.device_put(x, own[path]) for path, x in arrays.items()})


def _named(mesh: AnyMesh, spec: Spec) -> NamedSharding:
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return NamedSharding(mesh, PartitionSpec(*spec))
