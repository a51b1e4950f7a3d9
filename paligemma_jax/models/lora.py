"""Adapters of low rank on a stacked model: `add_lora`, `with_dropout`, `merge_lora`.

    model = add_lora(load_model(path), LoRA(rank=8, alpha=16), nnx.Rngs(0))

Only what matches `TRAINABLE` is to be trained. The base may be of few bits (`quantize_stacked`).

What adapters a model gets: `LoRA` (arXiv 2106.09685).

Layers with an adapter of low rank beside their weight: each stands in for one by its call.

The weight keeps its path, and the adapter's parameters lie beside it:

    lora_a      [*inputs, R]     [C, *inputs, R] where C weights are joined (k and v, gate and up)
    lora_b      [R, *outputs]    [C, R, *outputs]
    lora_scale  []               [C]; 0 where a part has no adapter; never trained

Parts have adapters of their own, so that they can be told apart again. All have the leading axis of
layers where layers are stacked. An adapter of a lower rank than its neighbours is filled up with
zeros, which training leaves zeros.

Letters: R rank.
"""

import dataclasses
import functools
import math
import re
import string
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.layers import Dense, Einsum
from paligemma_jax.models.paligemma import (
    PaliGemma,
    abstract_params,
    flatten,
    from_params,
    nest,
    to_params,
)
from paligemma_jax.models.quantized_layers import EINSUM_AXES, Axes, QuantizedDense, QuantizedEinsum

LANGUAGE_MODEL = "llm/layers/.*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapters of low rank: w + scale * a @ b beside each targeted weight w.

    Attributes:
      rank: inner width of a @ b.
      alpha: the scale is alpha / rank; None makes it the rank, a scale of 1.
      rslora: the scale is alpha / sqrt(rank) instead (arXiv 2312.03732).
      dropout: share of an adapter's inputs that is dropped in training; see `with_dropout`.
      targets: regular expression that must match a whole path, such as
        "llm/layers/attn/q_einsum" or "img/blocks/mlp/fc1". Weights that join two have a path for
        each too: "llm/layers/attn/kv_einsum/k" and ".../v", "llm/layers/mlp/gating_einsum/gate" and
        ".../up". The default is every product of the language model's layers;
        "(llm/layers|img)/.*" has those of the image encoder, and its projection, too.
    """

    rank: int = 8
    alpha: int | float | None = None
    rslora: bool = False
    dropout: int | float = 0.0
    targets: str = LANGUAGE_MODEL

    def __post_init__(self) -> None:
        problems = []
        if not self.rank >= 1:
            problems.append(f"rank is {self.rank}; 1 or more fits")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(f"alpha is {self.alpha}; a positive number fits")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}; a share from 0 to less than 1 fits")
        try:
            re.compile(self.targets)
        except re.error as e:
            problems.append(f"targets {self.targets!r} is no regular expression ({e})")
        if problems:
            raise ConfigError(
                f"These adapters cannot be made: {'; '.join(problems)}. Try "
                f"LoRA(rank=8, alpha=16, targets={LANGUAGE_MODEL!r})."
            )

    @property
    def scale(self) -> float:
        """What a @ b is multiplied by."""
        return scale_of(self.rank, self.rank if self.alpha is None else self.alpha, self.rslora)


def scale_of(rank: int, alpha: int | float, rslora: bool) -> float:
    """The factor of an adapter of this rank."""
    return alpha / (math.sqrt(rank) if rslora else rank)


_RANK = "r"  # in equations, whose other letters are capitals


class DropoutKey(nnx.Variable):
    """A random key for every layer, there only while gradients are taken; see `with_dropout`."""


class Adapter(nnx.Module):
    """What all layers with an adapter have; `spec` is what they were made by."""

    lora_a: nnx.Param
    lora_b: nnx.Param
    lora_scale: nnx.Param
    spec: LoRA
    dropout_key: DropoutKey | None

    def _add(self, y: jax.Array, x: jax.Array, into: str, out_of: str) -> jax.Array:
        """`y`, the product with the weight, plus that of `x` with the adapter.

        `into` is the equation of x and lora_a, and `out_of` that of what comes out and lora_b.
        """
        x = self._drop(x.astype(y.dtype))
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        scale = jax.lax.stop_gradient(self.lora_scale[...]).astype(jnp.float32)
        inner = jnp.einsum(into, x, a, preferred_element_type=jnp.float32) * scale[..., None]
        delta = jnp.einsum(out_of, inner.astype(x.dtype), b, preferred_element_type=jnp.float32)
        return (y.astype(jnp.float32) + delta).astype(y.dtype)

    def _drop(self, x: jax.Array) -> jax.Array:
        if self.dropout_key is None or not self.spec.dropout:
            return x
        keep = 1 - self.spec.dropout
        kept = jax.random.bernoulli(self.dropout_key[...], keep, x.shape)
        return jnp.where(kept, x / keep, 0).astype(x.dtype)

    def _take(self, spec: LoRA, a: jax.Array, b: jax.Array, scale: jax.Array) -> None:
        self.lora_a, self.lora_b = nnx.Param(a), nnx.Param(b)
        self.lora_scale = nnx.Param(scale)
        self.spec = spec
        self.dropout_key = nnx.data(None)  # so that a key may come in its place


class LoRAEinsum(Adapter, Einsum):
    """Stands in for `Einsum`."""

    def __init__(
        self, base: Einsum, axes: Axes, spec: LoRA, a: jax.Array, b: jax.Array, scale: jax.Array
    ):
        self.axes = axes
        self.dtype = base.dtype
        self.w = base.w
        self._take(spec, a, b, scale)

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `Einsum`."""
        y = Einsum.__call__(self, equation, x)
        return self._add(y, x, *_equations(equation, self.axes))


class LoRAQuantizedEinsum(Adapter, QuantizedEinsum):
    """Stands in for `QuantizedEinsum`."""

    def __init__(
        self,
        base: QuantizedEinsum,
        axes: Axes,
        spec: LoRA,
        a: jax.Array,
        b: jax.Array,
        scale: jax.Array,
    ):
        QuantizedEinsum.__init__(self, base.matrix, base.shape, axes, base.dtype)
        self._take(spec, a, b, scale)

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `Einsum`."""
        y = QuantizedEinsum.__call__(self, equation, x)
        return self._add(y, x, *_equations(equation, self.axes))


class LoRADense(Adapter, Dense):
    """Stands in for `Dense`."""

    def __init__(self, base: Dense, spec: LoRA, a: jax.Array, b: jax.Array, scale: jax.Array):
        self.axes = base.axes
        self.dtype = base.dtype
        self.kernel, self.bias = base.kernel, base.bias
        self._take(spec, a, b, scale)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = Dense.__call__(self, x)
        return self._add(y, x, *_dense_equations(self.axes, self.bias[...].ndim))


class LoRAQuantizedDense(Adapter, QuantizedDense):
    """Stands in for `QuantizedDense`."""

    def __init__(
        self, base: QuantizedDense, spec: LoRA, a: jax.Array, b: jax.Array, scale: jax.Array
    ):
        QuantizedDense.__init__(self, base.matrix, base.bias, base.axes, base.dtype)
        self._take(spec, a, b, scale)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = QuantizedDense.__call__(self, x)
        return self._add(y, x, *_dense_equations(self.axes, self.bias[...].ndim))


def _equations(equation: str, axes: Axes) -> tuple[str, str]:
    """The two products with an adapter that do what `equation` does with a weight of `axes`."""
    operands, result = equation.split("->")
    of_x, of_w = operands.split(",")
    lead = of_w[: axes.lead]
    ins = "".join(of_w[axis] for axis in axes.inputs)
    outs = "".join(of_w[axis] for axis in axes.outputs(len(of_w)))
    rows = "".join(letter for letter in of_x if letter not in ins)
    inner = rows + lead + _RANK
    return f"{of_x},{lead}{ins}{_RANK}->{inner}", f"{inner},{lead}{_RANK}{outs}->{result}"


def _dense_equations(inputs: int, outputs: int) -> tuple[str, str]:
    letters = string.ascii_uppercase
    ins, outs = letters[:inputs], letters[inputs : inputs + outputs]
    return f"...{ins},{ins}{_RANK}->...{_RANK}", f"...{_RANK},{_RANK}{outs}->...{outs}"


TRAINABLE = ".*/lora_[ab]"  # matches the paths of parameters that adapters are trained by
_IMAGE_LAYERS = ("attn/q", "attn/k", "attn/v", "attn/out", "mlp/fc1", "mlp/fc2")


def is_adapter(path: str) -> bool:
    """Whether the parameter at `path` is an adapter's: what is trained of it, or its scale."""
    return "/lora_" in path


@dataclasses.dataclass(frozen=True)
class Place:
    """One layer that can have an adapter.

    Attributes:
      path: e.g. "llm/layers/attn/kv_einsum".
      axes: of its weight, the axis of layers left out.
      shape: of its weight, the axis of layers left out.
      depth: number of layers stacked; None where it is one by itself.
    """

    path: str
    axes: Axes
    shape: tuple[int, ...]
    depth: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """The path of each part: its own where it is one weight."""
        return tuple(f"{self.path}/{part}" for part in self.axes.parts) or (self.path,)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Shape of what one adapter takes."""
        return tuple(self.shape[axis] for axis in self.axes.inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Shape of what one adapter gives."""
        return tuple(self.shape[axis] for axis in self.axes.outputs(len(self.shape)))

    @property
    def lead(self) -> tuple[int, ...]:
        """Shape of all adapters of this layer: layers, parts."""
        layers = () if self.depth is None else (self.depth,)
        return layers + ((len(self.axes.parts),) if self.axes.parts else ())


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The parameters of the adapters at one place, as `lora_layers` has them."""

    a: jax.Array
    b: jax.Array
    scale: jax.Array


def add_lora(model: PaliGemma, lora: LoRA, rngs: nnx.Rngs) -> PaliGemma:
    """The model with new adapters, whose answers are those of `model` until they are trained.

    `model` must be stacked and stays as it is; arrays are shared. lora_a is uniform within
    1/sqrt(inputs), lora_b is zero; both are float32. Raises ConfigError.
    """
    places = adaptable(model)
    chosen: dict[str, Arrays] = {}
    for path, place in places.items():
        whole = re.fullmatch(lora.targets, path) is not None
        parts = [whole or re.fullmatch(lora.targets, name) is not None for name in place.names]
        if any(parts):
            chosen[path] = _initial(place, lora, parts, rngs.params())
    if not chosen:
        listing = ", ".join(name for place in places.values() for name in place.names)
        raise ConfigError(
            f"targets {lora.targets!r} matches no layer. A regular expression that matches whole "
            f"paths fits; there are {listing}. Try LoRA(targets='llm/layers/.*')."
        )
    return put_adapters(model, lora, chosen)


def put_adapters(model: PaliGemma, lora: LoRA, arrays: Mapping[str, Arrays]) -> PaliGemma:
    """`add_lora` with given arrays, by the paths of their places."""
    shared = nnx.merge(*nnx.split(model))
    places = adaptable(shared)
    for path, adapter in arrays.items():
        owner, name = _find(shared, path)
        new = _adapt(getattr(owner, name), places[path].axes, lora, adapter)
        setattr(owner, name, new)
    return shared


def adaptable(model: PaliGemma) -> dict[str, Place]:
    """Every layer that can have an adapter, by its path; ConfigError if the model can have none."""
    if isinstance(model.llm.layers, nnx.List):
        raise ConfigError(
            "The layers of this model stand one by one, as answering wants them. Adapters need "
            "them stacked: load_model(path), or restack(model)."
        )
    if has_adapters(model):
        raise ConfigError(
            "This model has adapters already. One without fits. Call merge_lora(model) first to "
            "keep what they learned, or load the model again."
        )
    return find_places(model)


def find_places(model: PaliGemma) -> dict[str, Place]:
    """Every layer of a stacked model that an adapter can be at, by its path."""
    shapes = _shapes(model.config)
    places = {}
    for name, axes in EINSUM_AXES.items():
        depth, *shape = shapes[f"llm/layers/{name}/w"].shape
        places[f"llm/layers/{name}"] = Place(f"llm/layers/{name}", axes, tuple(shape), depth)
    for name in _IMAGE_LAYERS:
        depth, *shape = shapes[f"img/blocks/{name}/kernel"].shape
        axes = Axes(tuple(range(_get(model, f"img/blocks/{name}").axes)))
        places[f"img/blocks/{name}"] = Place(f"img/blocks/{name}", axes, tuple(shape), depth)
    places["img/head"] = Place("img/head", Axes((0,)), shapes["img/head/kernel"].shape, None)
    return places


@functools.lru_cache(maxsize=16)
def _shapes(config: PaliGemmaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten(abstract_params(config))


def adapters(model: nnx.Module) -> dict[str, Adapter]:
    """The layers that have an adapter, by their paths."""
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Adapter):
            found["/".join(map(str, path))] = module
    return found


def has_adapters(model: nnx.Module) -> bool:
    """Whether any layer has an adapter."""
    return bool(adapters(model))


def with_dropout(model: PaliGemma, key: jax.Array) -> PaliGemma:
    """The model as a training step should call it: adapters drop inputs, by `key` (typed).

    The very same model if it has no adapters, or none that drops anything. To be called inside the
    step, with another key each time; what it returns is not to be kept. Parts of one weight (k and
    v, gate and up) drop the same inputs.
    """
    if not any(layer.spec.dropout for layer in adapters(model).values()):
        return model
    shared = nnx.merge(*nnx.split(model))
    for path, layer in adapters(shared).items():
        own = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        stacked = path.startswith(("llm/layers/", "img/blocks/"))
        depth = layer.lora_a[...].shape[0]
        layer.dropout_key = DropoutKey(jax.random.split(own, depth) if stacked else own)
    return shared


def merge_lora(model: PaliGemma) -> PaliGemma:
    """The plain model with adapters added to the weights, in their dtype: w + scale * a @ b.

    The very same model if it has no adapters. Sums are taken in float32. Raises ConfigError for
    weights of few bits, which a sum would have to be rounded to once more.
    """
    found = adapters(model)
    if not found:
        return model
    if any(isinstance(x, LoRAQuantizedEinsum | LoRAQuantizedDense) for x in found.values()):
        raise ConfigError(
            "The weights of this model are quantized, and what adapters add would be lost in "
            "rounding. Weights as they were before fit. Call save_adapter(model, path), then "
            "merge_lora(load_adapter(load_model(base), path))."
        )
    flat = flatten(to_params(model))
    for path, layer in found.items():
        flat |= {f"{path}/{name}": None for name in ("lora_a", "lora_b", "lora_scale")}
        name = "w" if isinstance(layer, Einsum) else "kernel"
        w = flat[f"{path}/{name}"]
        flat[f"{path}/{name}"] = _merge(
            w, layer.lora_a[...], layer.lora_b[...], layer.lora_scale[...], _axes(layer)
        )
    kept = {path: array for path, array in flat.items() if array is not None}
    return from_params(model.config, nest(kept), model.dtype)


@functools.partial(jax.jit, static_argnames="axes")
def _merge(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, axes: Axes) -> jax.Array:
    layers = a.ndim - 1 - len(axes.inputs) - axes.lead
    letters = string.ascii_uppercase[: w.ndim]
    lead, own = letters[: layers + axes.lead], letters[layers:]
    ins = "".join(own[axis] for axis in axes.inputs)
    outs = "".join(own[axis] for axis in axes.outputs(len(own)))
    a, b, scale = (x.astype(jnp.float32) for x in (a, b, scale))
    equation = f"{lead}{ins}r,{lead},{lead}r{outs}->{letters}"
    delta = jnp.einsum(equation, a, scale, b, precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + delta).astype(w.dtype)


def _axes(layer: Adapter) -> Axes:
    if isinstance(layer, LoRAEinsum | LoRAQuantizedEinsum):
        return layer.axes
    assert isinstance(layer, LoRADense | LoRAQuantizedDense)
    return Axes(tuple(range(layer.axes)))


def _initial(place: Place, lora: LoRA, parts: list[bool], key: jax.Array) -> Arrays:
    """lora_a as PEFT draws it, zero for parts that get no adapter."""
    bound = 1 / math.sqrt(math.prod(place.inputs))
    shape = (*place.lead, *place.inputs, lora.rank)
    a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    b = jnp.zeros((*place.lead, lora.rank, *place.outputs), jnp.float32)
    wanted = jnp.array(parts if place.axes.parts else parts[0], jnp.float32)
    scale = jnp.broadcast_to(wanted * lora.scale, place.lead)
    inner = (1,) * (len(place.inputs) + 1)
    return Arrays(a * jnp.broadcast_to(wanted, place.lead).reshape(*place.lead, *inner), b, scale)


def _adapt(layer: nnx.Module, axes: Axes, lora: LoRA, arrays: Arrays) -> Adapter:
    taken = (lora, arrays.a, arrays.b, arrays.scale)
    match layer:
        case Einsum():
            return LoRAEinsum(layer, axes, *taken)
        case QuantizedEinsum():
            return LoRAQuantizedEinsum(layer, axes, *taken)
        case Dense():
            return LoRADense(layer, *taken)
        case QuantizedDense():
            return LoRAQuantizedDense(layer, *taken)
    raise TypeError(f"{type(layer).__name__} has no weight to adapt.")


def _find(model: PaliGemma, path: str) -> tuple[object, str]:
    *rooms, name = path.split("/")
    owner: object = model
    for room in rooms:
        owner = getattr(owner, room)
    return owner, name


def _get(model: PaliGemma, path: str) -> Any:
    owner, name = _find(model, path)
    return getattr(owner, name)
