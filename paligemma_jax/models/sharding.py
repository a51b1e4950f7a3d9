"""Where weights lie on a mesh: rules by parameter path, for models in every form.

The rules are those of `RULES`: heads, the MLP and rows of the token table over "tensor"; what is
left of each large weight over "fsdp". An axis that a mesh axis does not divide is not split
over it. XLA makes the communication of it.

The devices that arrays are split over: a mesh of three axes, of which most have size 1.

Rows of a batch go over "data" and "fsdp", weights over "fsdp" and "tensor".

Settings by parameter path: regular expressions that match whole paths, the first match wins.

big_vision's rule for schedules (None freezes), learning rate multipliers and weight decay.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

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
                f"{what} has no rule for {len(missing)} of {len(paths)} parameters: {shown}. Rules "
                'that cover every parameter fit. Add a last rule such as (".*", None), which '
                "freezes the rest."
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
                f"{what} has the rule {pattern!r}, which is no regular expression ({e}). A Python "
                'regular expression fits. Write for example "img/.*"'
            ) from e


def _suggest(pattern: str, paths: list[str]) -> str:
    """' (did you mean ...?)' with the nearest path that has a part like the pattern's."""
    near = difflib.get_close_matches(pattern.replace(".*", ""), paths, n=1, cutoff=0.3)
    return f" (the nearest path is {near[0]!r})" if near else ""


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
    graphdef, arrays = split_model(model)
    places = shardings(arrays, mesh, rules)
    return graphdef.merge_flat(
        {path: jax.device_put(x, places[path]) for path, x in arrays.items()}
    )


def _named(mesh: AnyMesh, spec: Spec) -> NamedSharding:
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return NamedSharding(mesh, PartitionSpec(*spec))
