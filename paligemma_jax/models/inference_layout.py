"""The same model with its layers one by one, for inference: `unstack_layers` and back.

Nothing is computed, only moved: each layer's weights become arrays of their own, fused where one
matmul can do the work of two, with the contracted axes last. Paths of the stacked form are those
that files and training know; `unstacked_params` says what becomes of each of them.

Letters: L layers, W width, F MLP width, N query heads, K key-value heads, H head width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.gemma import make_fused_block
from paligemma_jax.models.layers import DType
from paligemma_jax.models.lora import merge_lora
from paligemma_jax.models.paligemma import (
    PaliGemma,
    abstract_model,
    abstract_params,
    flatten,
    from_params,
    nest,
    split_model,
    to_params,
)
from paligemma_jax.models.quantized_matrix import is_quantized_array
from paligemma_jax.models.siglip import Block

_TEXT, _IMAGE = "llm/layers/", "img/blocks/"
_ArrayT = TypeVar("_ArrayT", jax.Array, np.ndarray)

# Stacked weight of a layer -> the fused one it becomes a part of, and the order of its axes there.
_FUSED: dict[str, tuple[str, tuple[int, ...]]] = {
    "attn/q_einsum/w": ("attn/qkv/w", (0, 2, 1)),  # [N, W, H] -> [N, H, W]
    "attn/kv_einsum/w": ("attn/qkv/w", (0, 1, 3, 2)),  # [2, K, W, H] -> [2 * K, H, W]
    "attn/attn_vec_einsum/w": ("attn/out/w", (2, 0, 1)),  # [N, H, W] -> [W, N, H]
    "mlp/gating_einsum/w": ("mlp/gate_up/w", (0, 2, 1)),  # [2, W, F] -> [2, F, W]
    "mlp/linear/w": ("mlp/down/w", (1, 0)),  # [F, W] -> [W, F]
}


@dataclasses.dataclass(frozen=True)
class ParamSlice:
    """One layer of a stacked parameter as a part of an unstacked one.

    Attributes:
      path: of the stacked parameter, e.g. "llm/layers/attn/q_einsum/w".
      axes: those of one of its layers, in their order there.
      shape: of one of its layers, in that order.
      rows: where it begins and ends on the first axis there.
    """

    path: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    rows: tuple[int, int]

    def view(self, whole: _ArrayT) -> _ArrayT:
        """Its part of an unstacked parameter, with axes as they are stacked; no copy by numpy."""
        part = whole[slice(*self.rows)].reshape(self.shape)
        return part.transpose([self.axes.index(axis) for axis in range(len(self.axes))])


@dataclasses.dataclass(frozen=True)
class UnstackedParam:
    """A parameter that every layer of an unstacked model has, or one that is of no layer.

    Attributes:
      prefix: of the layers, "llm/layers/" or "img/blocks/"; "" for one that is of no layer.
      name: what follows the number of the layer, or the whole path.
      depth: number of layers; None for one that is of no layer.
      shape: in each layer.
      pieces: what it is made of, joined on the first axis.
    """

    prefix: str
    name: str
    depth: int | None
    shape: tuple[int, ...]
    pieces: tuple[ParamSlice, ...]

    @property
    def paths(self) -> list[str]:
        """Of the unstacked model, layer by layer."""
        if self.depth is None:
            return [self.name]
        return [f"{self.prefix}{layer}/{self.name}" for layer in range(self.depth)]


def unstacked_params(config: PaliGemmaConfig) -> list[UnstackedParam]:
    """All parameters of the unstacked form, and how those of the stacked form make them."""
    groups: dict[tuple[str, str], list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
    depths = {_TEXT: config.llm.depth, _IMAGE: config.img.depth}
    stacked = flatten(abstract_params(config))
    order = list(_FUSED)
    for path in sorted(stacked, key=lambda p: order.index(n) if (n := _name(p)) in order else -1):
        prefix = _prefix(path)
        shape = stacked[path].shape[1:] if prefix else stacked[path].shape
        name, axes = _FUSED.get(_name(path), (_name(path), tuple(range(len(shape)))))
        groups.setdefault((prefix, name), []).append((path, axes, shape))
    found = []
    for (prefix, name), sources in groups.items():
        pieces: list[ParamSlice] = []
        rows, rest = 0, tuple(sources[0][2][axis] for axis in sources[0][1])[1:]
        for path, axes, shape in sources:
            end = rows + math.prod(shape) // math.prod(rest)
            pieces.append(ParamSlice(path, axes, tuple(shape[axis] for axis in axes), (rows, end)))
            rows = end
        found.append(UnstackedParam(prefix, name, depths.get(prefix), (rows, *rest), tuple(pieces)))
    return found


def _prefix(path: str) -> str:
    return next((prefix for prefix in (_TEXT, _IMAGE) if path.startswith(prefix)), "")


def _name(path: str) -> str:
    return path.removeprefix(_prefix(path))


def unstack_layers(model: PaliGemma) -> PaliGemma:
    """The model with its layers one by one; the very same model if it is that already.

    Weights are copied: while both models are alive they take their memory twice. Adapters are
    merged into them, see `merge_lora`. Raises ConfigError for stacked quantized weights.
    """
    if is_unstacked(model):
        return model
    params = flatten(to_params(plain(model)))
    arrays: dict[str, jax.Array] = {}
    for target in unstacked_params(model.config):
        stacked = tuple(params[piece.path] for piece in target.pieces)
        layers = stacked if target.depth is None else _split(stacked, target)
        arrays |= zip(target.paths, layers, strict=True)
    return split_model(abstract_unstacked(model.config, model.dtype))[0].merge_flat(arrays)


def is_unstacked(model: PaliGemma) -> bool:
    """Whether the model's layers stand by themselves."""
    return isinstance(model.llm.layers, nnx.List)


def abstract_unstacked(
    config: PaliGemmaConfig, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
) -> PaliGemma:
    """The unstacked module with shapes and dtypes in place of arrays."""
    kw = dict(dtype=dtype, param_dtype=param_dtype)
    model = abstract_model(config, **kw)
    # One of each and copies of it: JAX takes a second for the layers of a published model.
    text = nnx.eval_shape(lambda: make_fused_block(config.llm, **kw))
    image = nnx.eval_shape(lambda: Block(config.img, rngs=nnx.Rngs(0), **kw))
    model.llm.layers = nnx.List([nnx.clone(text) for _ in range(config.llm.depth)])
    model.img.blocks = nnx.List([nnx.clone(image) for _ in range(config.img.depth)])
    return model


def stack_layers(model: PaliGemma) -> PaliGemma:
    """The model with its layers stacked, as training wants it; the very same if they are.

    Weights are copied: while both models are alive they take their memory twice.
    """
    if not is_unstacked(model):
        return model
    params = {path: make() for path, make in stacked_params(model)}
    return from_params(model.config, nest(params), model.dtype)


def stacked_params(model: PaliGemma) -> Iterator[tuple[str, Callable[[], jax.Array]]]:
    """Path and maker of every parameter in the stacked form, from a model in either form.

    Each array is made when its maker is called, so that only one need be held at a time. Adapters
    are merged, see `merge_lora`. Raises ConfigError for quantized weights.
    """
    params = flatten(to_params(plain(model)))
    if not is_unstacked(model):
        yield from ((path, functools.partial(_same, array)) for path, array in params.items())
        return
    for target in unstacked_params(model.config):
        layers = tuple(params[path] for path in target.paths)
        for piece in target.pieces:
            if target.depth is None:
                yield piece.path, functools.partial(_same, *layers)
            else:
                yield piece.path, functools.partial(_stack, layers, piece)


def plain(model: PaliGemma) -> PaliGemma:
    """The model without adapters; ConfigError for one whose weights are quantized."""
    model = merge_lora(model)
    if any(map(is_quantized_array, jax.tree.leaves(model))):
        raise ConfigError(
            "The weights of this model are quantized, and those they were made of are gone. Load "
            "it without quantize=."
        )
    return model


def _same(array: jax.Array) -> jax.Array:
    return array


@functools.partial(jax.jit, static_argnames="target")
def _split(stacked: tuple[jax.Array, ...], target: UnstackedParam) -> tuple[jax.Array, ...]:
    """Every layer's parameter."""
    moved = [
        [layer.transpose(piece.axes).reshape(-1, *target.shape[1:]) for layer in array]
        for array, piece in zip(stacked, target.pieces, strict=True)
    ]
    return tuple(jnp.concatenate(parts) for parts in zip(*moved, strict=True))


@functools.partial(jax.jit, static_argnames="piece")
def _stack(layers: tuple[jax.Array, ...], piece: ParamSlice) -> jax.Array:
    """The inverse of `_split` for one of the pieces."""
    return jnp.stack([piece.view(layer) for layer in layers])
