"""The same model with its layers one by one, for inference: `unroll` there, `stack_params` back.

Nothing is computed, only moved: each layer's weights become arrays of their own, fused where one
product can do the work of two, with the contracted axes last. Parameter paths of the stacked form,
which files and training know, are the names here too; `_PIECES` says where each of them goes.

Letters: L layers, W width, F MLP width, N query heads, K key-value heads, H head width.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.abstract import from_params, to_params
from paligemma_jax.models.fused_block import make_fused_block
from paligemma_jax.models.layers import DType
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.paths import flatten, nest
from paligemma_jax.models.siglip import Block

_TEXT, _IMAGE = "llm/layers/", "img/blocks/"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where one layer's weight goes: all of `target`, or a part of it on the first axis."""

    target: str
    axes: tuple[int, ...] = ()  # of the weight, in their new order; () leaves it as it is
    merge: bool = False  # whether the first two axes then become one
    part: int | None = None

    def move(self, layer: jax.Array) -> jax.Array:
        """One layer's weight, with its axes as they are there."""
        layer = layer.transpose(self.axes) if self.axes else layer
        return layer.reshape(-1, *layer.shape[2:]) if self.merge else layer


_PIECES = {
    "attn/q_einsum/w": Piece("attn/qkv/w", (0, 2, 1), part=0),  # [N, W, H] -> [N, H, W]
    "attn/kv_einsum/w": Piece("attn/qkv/w", (0, 1, 3, 2), merge=True, part=1),  # [2 * K, H, W]
    "attn/attn_vec_einsum/w": Piece("attn/out/w", (2, 0, 1)),  # [N, H, W] -> [W, N, H]
    "mlp/gating_einsum/w": Piece("mlp/gate_up/w", (0, 2, 1)),  # [2, W, F] -> [2, F, W]
    "mlp/linear/w": Piece("mlp/down/w", (1, 0)),  # [F, W] -> [W, F]
}


def unroll(model: PaliGemma) -> PaliGemma:
    """The model with its layers one by one; the very same model if it is that already.

    Weights are copied: while both models are alive they take their memory twice.
    """
    if is_unrolled(model):
        return model
    layout = UnrolledParams(model.config)
    for path, array in flatten(to_params(model)).items():
        layout.add(path, array)
    return layout.model(model.dtype)


def is_unrolled(model: PaliGemma) -> bool:
    """Whether the model's layers stand by themselves."""
    return isinstance(model.llm.layers, nnx.List)


class UnrolledParams:
    """Collects the parameters of an unrolled model from those of a stacked one, in any order."""

    def __init__(self, config: PaliGemmaConfig):
        self._config = config
        self.arrays: dict[str, jax.Array] = {}
        self._waiting: dict[str, dict[int, tuple[jax.Array, ...]]] = {}

    def add(self, path: str, array: jax.Array) -> None:
        """Takes the parameter `path` of the stacked form, e.g. "llm/layers/mlp/linear/w"."""
        prefix, piece = find_piece(path)
        if prefix is None:
            self.arrays[path] = array
            return
        layers = _split(array, piece)
        if piece.part is not None:
            parts = self._waiting.setdefault(piece.target, {})
            parts[piece.part] = layers
            if len(parts) < 2:
                return
            layers = tuple(map(_join, parts.pop(0), parts.pop(1)))
        for number, layer in enumerate(layers):
            self.arrays[f"{prefix}{number}/{piece.target}"] = layer

    def model(self, dtype: DType) -> PaliGemma:
        """The model around what was added, which must be all; `dtype` is of its activations."""
        return fill(abstract_unrolled(self._config, dtype), self.arrays)


def fill(model: PaliGemma, arrays: Mapping[str, jax.Array]) -> PaliGemma:
    """A model of shapes with arrays in their place, by their paths; all must be there."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    filled = [(path, leaf.replace(arrays["/".join(map(str, path))])) for path, leaf in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def find_piece(path: str) -> tuple[str | None, Piece]:
    """The prefix of the layers that a parameter of the stacked form is of, and where it goes.

    The prefix of one that is of no layer is None; it goes where it is.
    """
    prefix = next((p for p in (_TEXT, _IMAGE) if path.startswith(p)), None)
    name = path.removeprefix(prefix or "")
    return prefix, (prefix and _PIECES.get(name)) or Piece(name)


def abstract_unrolled(
    config: PaliGemmaConfig, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
) -> PaliGemma:
    """The unrolled module with shapes and dtypes in place of arrays."""

    def make() -> PaliGemma:
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        model = PaliGemma(config, rngs=nnx.Rngs(0), **kw)
        text = [make_fused_block(config.llm, **kw) for _ in range(config.llm.depth)]
        image = [Block(config.img, rngs=nnx.Rngs(0), **kw) for _ in range(config.img.depth)]
        model.llm.layers, model.img.blocks = nnx.List(text), nnx.List(image)
        return model

    return nnx.eval_shape(make)


def restack(model: PaliGemma) -> PaliGemma:
    """The model with its layers stacked, as training wants it; the very same if they are.

    Weights are copied: while both models are alive they take their memory twice.
    """
    if not is_unrolled(model):
        return model
    params = {path: make() for path, make in stack_params(model)}
    return from_params(model.config, nest(params), model.dtype)


def stack_params(model: PaliGemma) -> Iterator[tuple[str, Callable[[], jax.Array]]]:
    """Path and maker of every parameter in the stacked form, from a model in either form.

    Each array is made when its maker is called, so that only one need be held at a time. Raises
    ConfigError for weights that are rounded to integers.
    """
    if any(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(model)):
        raise ConfigError(
            "The weights of this model are quantized, and those they were made of are gone. A "
            "model as it was trained fits. Load it without quantize=, and quantize what you load "
            "later: from_pretrained(path, quantize='int8')"
        )
    flat = flatten(to_params(model))
    if not is_unrolled(model):
        yield from ((path, functools.partial(_same, array)) for path, array in flat.items())
        return
    for path, array in flat.items():
        prefix = next((p for p in (_TEXT, _IMAGE) if path.startswith(p)), None)
        if prefix is None:
            yield path, functools.partial(_same, array)
            continue
        number, _, target = path.removeprefix(prefix).partition("/")
        if number != "0":
            continue
        depth = (model.config.llm if prefix == _TEXT else model.config.img).depth
        layers = tuple(flat[f"{prefix}{layer}/{target}"] for layer in range(depth))
        sources = {name: p for name, p in _PIECES.items() if p.target == target}
        for name, piece in (sources or {target: Piece(target)}).items():
            heads = model.config.llm.num_heads
            yield prefix + name, functools.partial(_stack, layers, piece, heads)


def _same(array: jax.Array) -> jax.Array:
    return array


@functools.partial(jax.jit, static_argnames="piece")
def _split(array: jax.Array, piece: Piece) -> tuple[jax.Array, ...]:
    return tuple(piece.move(layer) for layer in array)


@jax.jit
def _join(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.concatenate([first, second])


@functools.partial(jax.jit, static_argnames=("piece", "heads"))
def _stack(layers: tuple[jax.Array, ...], piece: Piece, heads: int) -> jax.Array:
    """The inverse of `_split` and `_join`."""
    if piece.part is not None:
        layers = tuple(x[:heads] if piece.part == 0 else x[heads:] for x in layers)
    if piece.merge:
        layers = tuple(x.reshape(2, -1, *x.shape[1:]) for x in layers)
    back = tuple(piece.axes.index(axis) for axis in range(len(piece.axes)))
    return jnp.stack([x.transpose(back) if back else x for x in layers])
