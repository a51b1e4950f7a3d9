"""Norms, dropout, and how layers are run: stacked or one by one, with or without remat.

Layers of one kind are stacked on a leading axis and run by scan (small programs, for training), or
stand in an `nnx.List` and run one by one (for inference: a scan copies every weight out of the
stack before it is used, which takes as long as reading it). Also here are matmuls with weights
whose contracted axes come last, in the forms that XLA is fast at.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Num, Shaped

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.masks import Layer

DType = Any  # what numpy takes as a dtype
NORM_EPS = 1e-6


def normal_init(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: DType) -> jax.Array:
    """Truncated normal of variance 1/fan_in."""
    scale = 1 / math.sqrt(fan_in) / 0.87962566  # std of a unit normal cut at +-2
    return (jax.random.truncated_normal(key, -2.0, 2.0, shape) * scale).astype(dtype)


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis (arXiv 1607.06450), epsilon 1e-6."""

    def __init__(self, width: int, *, dtype: DType, param_dtype: DType):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        # In two passes: E[x^2] - E[x]^2 would lose all digits where the mean is large.
        gain = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)
        x = x * (gain * self.scale[...].astype(jnp.float32))
        return (x + self.bias[...].astype(jnp.float32)).astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root mean square normalization (arXiv 1910.07467); the scale is applied as 1 + scale."""

    def __init__(self, width: int, *, dtype: DType, param_dtype: DType):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)
        return (x * (1.0 + self.scale[...].astype(jnp.float32))).astype(self.dtype)


_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout (JMLR 15, 2014) with a key that is passed on, never stored.

    Attributes:
      key: key[], a new one for every step.
      rate: fraction of activations set to zero, from 0.0 to below 1.0; the others are scaled up.
    """

    key: jax.Array
    rate: float = dataclasses.field(metadata=_STATIC)

    def fold_in(self, index: int | jax.Array) -> "Dropout":
        """The same with the key of one layer, or of one place in a layer."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, index))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if not self.rate:
            return x
        kept = jax.random.bernoulli(self.key, 1.0 - self.rate, x.shape)
        return jnp.where(kept, x / (1.0 - self.rate), jnp.zeros((), x.dtype))


# What of a layer's forward pass is kept for its gradient, and what is computed again.
# "none": everything is kept, the fastest and by far the most memory. "dots": results of matmuls
# with weights are kept. "full": only each layer's input is kept, a third more arithmetic.
Remat = Literal["none", "dots", "full"]
MATMUL = "matmul"  # name of the results of matmuls with weights, for `jax.checkpoint`


def _checkpoint(layer: Callable[..., Any], remat: Remat, scanned: bool) -> Callable[..., Any]:
    """`layer` with the same values and gradients; `scanned` if it is the body of a scan."""
    if remat not in ("none", "dots", "full"):
        raise ConfigError(f'Expected remat "none", "dots" or "full", got {remat!r}.')
    if remat == "none":
        return layer
    policy = None
    if remat == "dots":
        policy = jax.checkpoint_policies.save_only_these_names(MATMUL)
    return jax.checkpoint(layer, prevent_cse=not scanned, policy=policy)


Module = TypeVar("Module", bound=nnx.Module)
Carry = TypeVar("Carry")


def init_stacked(make: Callable[[nnx.Rngs], Module], depth: int, rngs: nnx.Rngs) -> Module:
    """One module whose every parameter has a leading axis of `depth`."""
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(keys)


def scan_layers(
    layers: nnx.Module,
    apply: Callable[[Any, Carry, Layer], Carry],
    carry: Carry,
    remat: Remat = "none",
) -> Carry:
    """Folds `apply(layer, carry, index)` over the layers, first to last."""
    if isinstance(layers, nnx.List):
        for index, layer in enumerate(layers):
            one = functools.partial(_apply_one, apply, layer, index)
            carry = _checkpoint(one, remat, scanned=False)(carry)
        return carry
    graphdef, params = nnx.split(layers)
    depth = jax.tree.leaves(params)[0].shape[0]

    def step(carry: Carry, xs: tuple[Any, jax.Array]) -> tuple[Carry, None]:
        layer_params, index = xs
        return apply(nnx.merge(graphdef, layer_params), carry, index), None

    body = _checkpoint(step, remat, scanned=True)
    return jax.lax.scan(body, carry, (params, jnp.arange(depth)))[0]


def _apply_one(
    apply: Callable[[Any, Carry, Layer], Carry], layer: nnx.Module, index: int, carry: Carry
) -> Carry:
    return apply(layer, carry, index)


def fold_layers(
    layers: nnx.Module, apply: Callable[[Any, Carry, Layer], Carry], carry: Carry
) -> Carry:
    """`scan_layers` where no gradient is wanted: one layer's weights are upcast at a time.

    XLA on CPUs multiplies bfloat16 by upcasting it to float32, and moves that out of the loop:
    12 GB more for a model of 3B parameters. The barrier keeps it inside. Elsewhere, and in float32,
    this is `scan_layers`.
    """
    if isinstance(layers, nnx.List):
        return scan_layers(layers, apply, carry)
    graphdef, params = nnx.split(layers)
    leaves = jax.tree.leaves(params)
    if not on_cpu() or all(leaf.dtype.itemsize >= 4 for leaf in leaves):
        return scan_layers(layers, apply, carry)

    def step(carry: Carry, index: jax.Array) -> tuple[Carry, None]:
        carry, inside = jax.lax.optimization_barrier((carry, params))
        layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, 0, False), inside)
        return apply(nnx.merge(graphdef, layer), carry, index), None

    return jax.lax.scan(step, carry, jnp.arange(leaves[0].shape[0]))[0]


def backend() -> str:
    """JAX's name of the devices, "cpu", "gpu" or "tpu": the one place that asks."""
    return jax.default_backend()


def on_cpu() -> bool:
    """Whether programs are for a CPU, where XLA is fast at other forms."""
    return backend() == "cpu"


P = ParamSpec("P")
R = TypeVar("R")

# Scales of groups of 4-bit weights are applied inside of a matmul; without it XLA for GPUs writes
# the whole matrix in 16 bits and reads it again. It changes no other matmul.
_OPTIONS = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}


class Jitted(Generic[P, R]):
    """A function as `jax.jit` compiles it, on accelerators with options for quantized matmuls.

    Takes what `jax.jit` takes, and has the attributes of what that returns. Inside of another
    jitted function the options are up to that one.
    """

    def __init__(self, function: Callable[P, R], **options: Any):
        functools.update_wrapper(self, function)
        self._plain = jax.jit(function, **options)
        self._with_options = jax.jit(function, compiler_options=_OPTIONS, **options)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        jitted = self._jitted()
        if jitted is not self._plain:
            leaves = jax.tree.leaves((args, kwargs))
            jitted = self._plain if any(isinstance(x, Tracer) for x in leaves) else jitted
        return jitted(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._jitted(), name)

    def _jitted(self) -> Any:
        return self._plain if on_cpu() or not _has_options() else self._with_options


@functools.cache
def _has_options() -> bool:
    """Whether this version of XLA has the options; they are experimental."""
    try:
        jax.jit(lambda: 0, compiler_options=_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


FEW_ROWS = 64  # of a matmul on a CPU, up to which the matrix should come first
BLOCK = 2 << 20  # weights: 8 MB in float32; 2 and 16 MB took CPUs twice as long


def contract(w: Num[Array, "..."], x: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """w [*out, *in] by x [*rows, *in], summed over the `axes` axes of in: f32[*rows, *out].

    Both are multiplied in the dtype of `x` and added up in float32. Integers may be weights too.
    """
    rows, outs = x.shape[: x.ndim - axes], w.shape[: w.ndim - axes]
    width = math.prod(x.shape[x.ndim - axes :])
    # As plain matrices: XLA has fast matmuls on CPUs for nothing else.
    x, w = x.reshape(-1, width), w.astype(x.dtype).reshape(-1, width)
    if on_cpu() and x.shape[0] <= FEW_ROWS:
        return _contract_few_rows(w, x).reshape(*rows, *outs)
    return jnp.einsum("oi,ri->ro", w, x, preferred_element_type=jnp.float32).reshape(*rows, *outs)


def _contract_few_rows(w: Float[Array, "O I"], x: Float[Array, "R I"]) -> Float[Array, "R O"]:
    """The matmul on a CPU with the matrix first, however few the rows are.

    A decoding step takes as long as reading the weights does. So XLA reads rows of the matrix one
    after the other, for eight rows of `x` in little more time than for one (the other way round
    takes twice as long).
    """
    count = x.shape[0]
    if count == 1 and x.dtype != jnp.float32:
        # XLA upcasts the whole matrix for a matmul with one row, not for one with two.
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    y = jnp.einsum("oi,ri->or", w, x, preferred_element_type=jnp.float32)
    if count > 1:  # or XLA would make it the matmul with the matrix last
        y = jax.lax.optimization_barrier(y)
    return y.T[:count]


def in_row_blocks(
    matmul: Callable[..., Shaped[Array, "rows R"]],
    *arrays: Shaped[Array, "O ..."],
    columns: int,
) -> Shaped[Array, "O R"]:
    """`matmul(*arrays)` of some rows of the arrays at a time; `columns` weights are in a row.

    XLA on CPUs dequantizes a whole matrix in memory before it multiplies it: many times the work of
    reading the matrix. A block stays in the cache.
    """
    count = arrays[0].shape[0]
    blocks = -(-count * columns // BLOCK)
    if blocks <= 1:
        return matmul(*arrays)
    size = min(-(-count // (64 * blocks)) * 64, count)
    last = count - size  # the last block overlaps the one before it

    def block(number: jax.Array) -> jax.Array:
        start = jnp.minimum(number * size, last)
        return matmul(*(jax.lax.dynamic_slice_in_dim(a, start, size) for a in arrays))

    blocks = -(-count // size)
    out = jax.lax.map(block, jnp.arange(blocks))
    if blocks * size == count:
        return out.reshape(count, -1)
    whole = out[:-1].reshape((blocks - 1) * size, -1)
    return jnp.concatenate([whole, out[-1, whole.shape[0] - last :]])
