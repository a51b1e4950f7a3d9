"""LoRA adapters (arXiv 2106.09685) on a stacked model: `add_lora`, `with_dropout`, `merge_lora`.

    model = add_lora(load_model(path), LoRA(rank=8, alpha=16), nnx.Rngs(0))

Only what matches `TRAINABLE` is to be trained. The base may be quantized (`quantize_stacked`). An
adapter of a lower rank than its neighbors is padded with zeros, which training leaves zeros.
"""

import dataclasses
import functools
import math
import re
import string
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.linear import DropoutKey, EinsumAxes, Linear
from paligemma_jax.models.paligemma import (
    PaliGemma,
    abstract_params,
    flatten,
    from_params,
    nest,
    to_params,
)

LANGUAGE_MODEL = "llm/layers/.*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapters of low rank: w + scale * a @ b beside each targeted weight w.

    Attributes:
      rank: inner width of a @ b.
      alpha: the scale is alpha / rank; None makes it the rank, a scale of 1.
      rslora: the scale is alpha / sqrt(rank) instead (arXiv 2312.03732).
      dropout: fraction of an adapter's inputs that is dropped in training; see `with_dropout`.
      targets: regular expression that must match a whole path, such as
        "llm/layers/attn/q_einsum" or "img/blocks/mlp/fc1". Weights that join two have a path for
        each too: "llm/layers/attn/kv_einsum/k" and ".../v", "llm/layers/mlp/gating_einsum/gate" and
        ".../up". The default is every linear layer of the language model; "(llm/layers|img)/.*"
        has those of the image encoder, and its projection, too.
    """

    rank: int = 8
    alpha: int | float | None = None
    rslora: bool = False
    dropout: int | float = 0.0
    targets: str = LANGUAGE_MODEL

    def __post_init__(self) -> None:
        problems = []
        if not self.rank >= 1:
            problems.append(f"rank is {self.rank}, must be 1 or more")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(f"alpha is {self.alpha}, must be positive")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}, must be from 0 to below 1")
        try:
            re.compile(self.targets)
        except re.error as e:
            problems.append(f"targets {self.targets!r} is no regular expression ({e})")
        if problems:
            raise ConfigError(
                f"These adapters are invalid: {'; '.join(problems)}. Try "
                f"LoRA(rank=8, alpha=16, targets={LANGUAGE_MODEL!r})."
            )

    @property
    def scale(self) -> float:
        """What a @ b is multiplied by."""
        return scale_of(self.rank, self.rank if self.alpha is None else self.alpha, self.rslora)


def scale_of(rank: int, alpha: int | float, rslora: bool) -> float:
    """The factor of an adapter of this rank."""
    return alpha / (math.sqrt(rank) if rslora else rank)


TRAINABLE = ".*/lora_[ab]"  # matches the paths of parameters that adapters are trained by


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
    axes: EinsumAxes
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
            f"targets {lora.targets!r} matches no layer. Expected a regular expression for whole "
            f"paths, of {listing}. Try LoRA(targets='llm/layers/.*')."
        )
    return put_adapters(model, lora, chosen)


def put_adapters(model: PaliGemma, lora: LoRA, arrays: Mapping[str, Arrays]) -> PaliGemma:
    """`add_lora` with given arrays, by the paths of their layers."""
    shared = nnx.merge(*nnx.split(model))
    for path, adapter in arrays.items():
        *parents, name = path.split("/")
        owner = functools.reduce(getattr, parents, shared)
        layer: Linear = getattr(owner, name)
        setattr(owner, name, layer.with_adapter(lora, adapter.a, adapter.b, adapter.scale))
    return shared


def adaptable(model: PaliGemma) -> dict[str, Place]:
    """Every layer that can have an adapter, by its path; ConfigError if the model can have none."""
    if isinstance(model.llm.layers, nnx.List):
        raise ConfigError(
            "Expected stacked layers, got layers one by one, the form for inference. Call "
            "load_model(path), or stack_layers(model)."
        )
    if has_adapters(model):
        raise ConfigError(
            "This model has adapters already. Call merge_lora(model) first to keep what they "
            "learned, or load the model again."
        )
    return find_places(model)


def find_places(model: PaliGemma) -> dict[str, Place]:
    """Every layer of a stacked model that an adapter can be at, by its path."""
    shapes = _shapes(model.config)
    places = {}
    for path, layer in _linear_layers(model).items():
        stacked = path.startswith(("llm/layers/", "img/blocks/"))
        if stacked or path == "img/head":
            shape = shapes[f"{path}/{layer.weight_name}"].shape
            depth = shape[0] if stacked else None
            places[path] = Place(path, layer.axes, shape[1:] if stacked else shape, depth)
    return places


def _linear_layers(model: nnx.Module) -> dict[str, Linear]:
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            found["/".join(map(str, path))] = module
    return found


@functools.lru_cache(maxsize=16)
def _shapes(config: PaliGemmaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten(abstract_params(config))


def adapters(model: nnx.Module) -> dict[str, Linear]:
    """The layers that have an adapter, by their paths."""
    layers = _linear_layers(model)
    return {path: layer for path, layer in layers.items() if layer.lora_a is not None}


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
        assert layer.lora_a is not None
        own = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        stacked = path.startswith(("llm/layers/", "img/blocks/"))
        depth = layer.lora_a[...].shape[0]
        layer.dropout_key = DropoutKey(jax.random.split(own, depth) if stacked else own)
    return shared


def merge_lora(model: PaliGemma) -> PaliGemma:
    """The plain model with adapters added to the weights, in their dtype: w + scale * a @ b.

    The very same model if it has no adapters. Sums are taken in float32. Raises ConfigError for
    quantized weights, which a sum would have to be quantized to once more.
    """
    found = adapters(model)
    if not found:
        return model
    if any(layer.matrix is not None for layer in found.values()):
        raise ConfigError(
            "The weights of this model are quantized, and what adapters add would be lost in "
            "rounding. Call save_adapter(model, path), then "
            "merge_lora(load_adapter(load_model(base), path))."
        )
    flat = flatten(to_params(model))
    for path, layer in found.items():
        adapter = [flat.pop(f"{path}/{name}") for name in ("lora_a", "lora_b", "lora_scale")]
        weight = f"{path}/{layer.weight_name}"
        flat[weight] = _merge(flat[weight], *adapter, layer.axes)
    return from_params(model.config, nest(flat), model.dtype)


@functools.partial(jax.jit, static_argnames="axes")
def _merge(
    w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, axes: EinsumAxes
) -> jax.Array:
    layers = a.ndim - 1 - len(axes.inputs) - axes.lead
    letters = string.ascii_uppercase[: w.ndim]
    lead, own = letters[: layers + axes.lead], letters[layers:]
    ins = "".join(own[axis] for axis in axes.inputs)
    outs = "".join(own[axis] for axis in axes.outputs(len(own)))
    a, b, scale = (x.astype(jnp.float32) for x in (a, b, scale))
    equation = f"{lead}{ins}r,{lead},{lead}r{outs}->{letters}"
    delta = jnp.einsum(equation, a, scale, b, precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + delta).astype(w.dtype)


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
