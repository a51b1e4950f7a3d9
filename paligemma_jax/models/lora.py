"""Adapters of low rank on a stacked model: `add_lora`, `with_dropout`, `merge_lora`.

    model = add_lora(load_model(path), LoRA(rank=8, alpha=16), nnx.Rngs(0))

Only what matches `TRAINABLE` is to be trained. The base may be of few bits (`quantize_stacked`).
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

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.abstract import abstract_params, from_params, to_params
from paligemma_jax.models.einsum_axes import EINSUM_AXES, Axes
from paligemma_jax.models.layers import Dense, Einsum
from paligemma_jax.models.lora_layers import (
    Adapter,
    DropoutKey,
    LoRADense,
    LoRAEinsum,
    LoRAQuantizedDense,
    LoRAQuantizedEinsum,
)
from paligemma_jax.models.lora_spec import LoRA as LoRA
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.paths import flatten, nest
from paligemma_jax.models.quantized_einsum import QuantizedEinsum
from paligemma_jax.models.quantized_layers import QuantizedDense

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
