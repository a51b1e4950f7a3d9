"""The few layers everything is made of: Einsum, Dense, the two norms.

Parameters keep their own dtype; each layer computes in the activation dtype it is told, accumulates
products in float32, and takes norm statistics in float32.

What of a layer's forward pass is kept for its gradient, and what is computed again.

What this process computes on: the one place that asks.

Layers of one kind, one after the other: stacked on a leading axis, or each by itself.

Stacked ones are initialised by vmap and run by scan: small programs, for training. Those in an
`nnx.List` are run one by one, each with its weights where they lie. That is for inference, since a
scan copies every weight out of the stack before it is used, which takes as long as reading it.

Dropout (JMLR 15, 2014) with a key that is handed on, never stored.

`jax.jit` for programs that multiply by a model's weights, which may be of few bits.

Products with weights whose contracted axes come last, as matrices are stored for decoding.

A decoding step multiplies few rows by every weight, so it takes as long as reading the weights
does. Rows of the matrix are then read one after the other, and the matrix comes first: on CPUs XLA
multiplies it by eight rows in little more time than by one (the other way round twice as long).

Products of matrices that must be widened first, a block of their rows at a time.

XLA on CPUs widens a whole matrix in memory before it multiplies it: many times the work of reading
the matrix. A block stays in the cache.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Float, Num, Shaped

from paligemma_jax.models.masks import Layer

Function = Callable[..., Any]
_PRODUCT = "product"


@runtime_checkable
class Remat(Protocol):
    """A choice between memory and time."""

    def wrap(self, layer: Function, scanned: bool) -> Function:
        """`layer` with the same values and gradients; `scanned` if it is the body of a scan."""
        ...


@dataclasses.dataclass(frozen=True)
class KeepAll:
    """Nothing is computed again: the fastest, and by far the most memory."""

    def wrap(self, layer: Function, scanned: bool) -> Function:
        return layer


@dataclasses.dataclass(frozen=True)
class KeepProducts:
    """Products with weights are kept; attention, norms and activations are computed again."""

    def wrap(self, layer: Function, scanned: bool) -> Function:
        policy = jax.checkpoint_policies.save_only_these_names(_PRODUCT)
        return jax.checkpoint(layer, prevent_cse=not scanned, policy=policy)


@dataclasses.dataclass(frozen=True)
class KeepInputs:
    """Only each layer's input is kept: the least memory, a third more arithmetic."""

    def wrap(self, layer: Function, scanned: bool) -> Function:
        return jax.checkpoint(layer, prevent_cse=not scanned)


def product(x: jax.Array) -> jax.Array:
    """Marks the result of a product with a weight, for `KeepProducts`."""
    return checkpoint_name(x, _PRODUCT)


DType = Any  # what numpy takes as a dtype
NORM_EPS = 1e-6


def normal_init(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: DType) -> jax.Array:
    """Truncated normal of variance 1/fan_in."""
    scale = 1 / math.sqrt(fan_in) / 0.87962566  # std of a unit normal cut at +-2
    return (jax.random.truncated_normal(key, -2.0, 2.0, shape) * scale).astype(dtype)


class Einsum(nnx.Module):
    """One weight tensor contracted by an einsum equation; what LoRA and quantisation replace."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        fan_in: int,
        rngs: nnx.Rngs,
        dtype: DType,
        param_dtype: DType,
    ):
        self.dtype = dtype
        self.w = nnx.Param(normal_init(rngs.params(), shape, fan_in, param_dtype))

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Contracts `x` with the weight; float32 accumulation, result in the activation dtype."""
        w, x = self.w[...].astype(self.dtype), x.astype(self.dtype)
        operands, result = equation.split("->")
        parts = operands.split(",")[1][0]
        if result.startswith(parts):
            # Joined parts as a batch: or XLA copies the weight with its axes in another order.
            x = jnp.broadcast_to(x, (w.shape[0], *x.shape))
            equation = parts + equation
        y = jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)
        return product(y.astype(self.dtype))


class Dense(nnx.Module):
    """`x @ kernel + bias`, where kernel may have several input or output axes."""

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        dtype: DType,
        param_dtype: DType,
    ):
        self.axes = len(in_shape)
        self.dtype = dtype
        fan_in = math.prod(in_shape)
        self.kernel = nnx.Param(
            normal_init(rngs.params(), in_shape + out_shape, fan_in, param_dtype)
        )
        self.bias = nnx.Param(jnp.zeros(out_shape, param_dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = jnp.tensordot(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            axes=self.axes,
            preferred_element_type=jnp.float32,
        )
        return product((y + self.bias[...].astype(jnp.float32)).astype(self.dtype))


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (arXiv 1607.06450), epsilon 1e-6."""

    def __init__(self, width: int, *, dtype: DType, param_dtype: DType):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        mean = jnp.mean(x, axis=-1, keepdims=True)
        # E[x^2] - E[x]^2 as the reference has it: any other rounding moves its logits by 1e-4.
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean)
        gain = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + NORM_EPS)
        x = (x - mean) * (gain * self.scale[...].astype(jnp.float32))
        return (x + self.bias[...].astype(jnp.float32)).astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root mean square normalisation (arXiv 1910.07467); the scale is applied as 1 + scale."""

    def __init__(self, width: int, *, dtype: DType, param_dtype: DType):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)
        return (x * (1.0 + self.scale[...].astype(jnp.float32))).astype(self.dtype)


def name() -> str:
    """JAX's name of the devices: "cpu", "gpu" or "tpu"; tests of programs put another here."""
    return jax.default_backend()


def on_cpu() -> bool:
    """Whether programs are for a CPU, where XLA has other forms that are fast."""
    return name() == "cpu"


Module = TypeVar("Module", bound=nnx.Module)
Carry = TypeVar("Carry")
KEEP_ALL = KeepAll()


def stack_layers(make: Callable[[nnx.Rngs], Module], depth: int, rngs: nnx.Rngs) -> Module:
    """One module whose every parameter has a leading axis of `depth`."""
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(keys)


def scan_layers(
    layers: nnx.Module,
    apply: Callable[[Any, Carry, Layer], Carry],
    carry: Carry,
    remat: Remat = KEEP_ALL,
) -> Carry:
    """Folds `apply(layer, carry, index)` over the layers, first to last.

    `remat` says what of each is kept for its gradient.
    """
    if isinstance(layers, nnx.List):
        for index, layer in enumerate(layers):
            carry = remat.wrap(_one(apply, layer, index), scanned=False)(carry)
        return carry
    graphdef, params = nnx.split(layers)
    depth = jax.tree.leaves(params)[0].shape[0]

    def step(carry: Carry, xs: tuple[Any, jax.Array]) -> tuple[Carry, None]:
        layer_params, index = xs
        return apply(nnx.merge(graphdef, layer_params), carry, index), None

    body = remat.wrap(step, scanned=True)
    return jax.lax.scan(body, carry, (params, jnp.arange(depth)))[0]


def _one(
    apply: Callable[[Any, Carry, Layer], Carry], layer: nnx.Module, index: int
) -> Callable[[Carry], Carry]:
    return lambda carry: apply(layer, carry, index)


def fold_layers(
    layers: nnx.Module, apply: Callable[[Any, Carry, Layer], Carry], carry: Carry
) -> Carry:
    """`scan_layers` where no gradient is wanted: one layer's weights are widened at a time.

    XLA on CPUs multiplies bfloat16 by widening it to float32, and moves that out of the loop: 12 GB
    more for a model of 3B parameters. The barrier keeps it inside. Elsewhere, and in float32, this
    is `scan_layers`.
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


_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Sets a share of the activations to zero and scales up the others.

    Attributes:
      key: key[], a new one for every step.
      rate: share that is dropped, from 0.0 (nothing happens) to below 1.0.
      shared_axes: axes along which activations are dropped together.
    """

    key: jax.Array
    rate: float = dataclasses.field(metadata=_STATIC)
    shared_axes: tuple[int, ...] = dataclasses.field(default=(), metadata=_STATIC)

    def at(self, place: int | jax.Array) -> "Dropout":
        """The same with the key of one layer, or of one place in a layer."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, place))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if not self.rate:
            return x
        shape = [1 if axis in self.shared_axes else size for axis, size in enumerate(x.shape)]
        kept = jax.random.bernoulli(self.key, 1.0 - self.rate, shape)
        return jnp.where(kept, x / (1.0 - self.rate), jnp.zeros((), x.dtype))


P = ParamSpec("P")
R = TypeVar("R")

# Scales of groups of 4-bit weights are applied inside of a product; without it XLA for GPUs writes
# the whole matrix in 16 bits and reads it again. It changes no other product.
_OPTIONS = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}


class Jitted(Generic[P, R]):
    """A function as `jax.jit` compiles it, on accelerators with options for products.

    Takes what `jax.jit` takes, and has the attributes of what that returns. Inside of another
    jitted function the options are up to that one.
    """

    def __init__(self, function: Callable[P, R], **how: Any):
        functools.update_wrapper(self, function)
        self._plain = jax.jit(function, **how)
        self._with_options = jax.jit(function, compiler_options=_OPTIONS, **how)

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
        return self._plain if on_cpu() or not _known() else self._with_options


@functools.cache
def _known() -> bool:
    """Whether this version of XLA has the options; they are experimental."""
    try:
        jax.jit(lambda: 0, compiler_options=_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


FEW_ROWS = 64  # of a product on a CPU, up to which the matrix should come first


def contract(w: Num[Array, "..."], x: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """w [*out, *in] by x [*rows, *in], summed over the `axes` axes of in: f32[*rows, *out].

    Both are multiplied in the dtype of `x` and added up in float32. Integers may be weights too.
    """
    rows, outs = x.shape[: x.ndim - axes], w.shape[: w.ndim - axes]
    width = math.prod(x.shape[x.ndim - axes :])
    # As plain matrices: XLA has fast products on CPUs for nothing else.
    x, w = x.reshape(-1, width), w.astype(x.dtype).reshape(-1, width)
    count = x.shape[0]
    if on_cpu() and count <= FEW_ROWS:
        return _few_rows(w, x).reshape(*rows, *outs)
    return jnp.einsum("oi,ri->ro", w, x, preferred_element_type=jnp.float32).reshape(*rows, *outs)


def _few_rows(w: Float[Array, "O I"], x: Float[Array, "R I"]) -> Float[Array, "R O"]:
    """The product on a CPU with the matrix first, however few the rows are."""
    count = x.shape[0]
    if count == 1 and x.dtype != jnp.float32:
        # XLA widens the whole matrix for a product with one row, not for one with two.
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    y = jnp.einsum("oi,ri->or", w, x, preferred_element_type=jnp.float32)
    if count > 1:  # or XLA would make it the product with the matrix last
        y = jax.lax.optimization_barrier(y)
    return y.T[:count]


BLOCK = 2 << 20  # weights: 8 MB in float32; 2 and 16 MB took CPUs twice as long


def in_row_blocks(
    product: Callable[..., Shaped[Array, "rows R"]],
    *arrays: Shaped[Array, "O ..."],
    columns: int,
) -> Shaped[Array, "O R"]:
    """`product(*arrays)` of some rows of the arrays at a time; `columns` weights are in a row."""
    count = arrays[0].shape[0]
    blocks = -(-count * columns // BLOCK)
    if blocks <= 1:
        return product(*arrays)
    size = min(-(-count // (64 * blocks)) * 64, count)
    last = count - size  # the last block overlaps the one before it

    def block(number: jax.Array) -> jax.Array:
        start = jnp.minimum(number * size, last)
        return product(*(jax.lax.dynamic_slice_in_dim(a, start, size) for a in arrays))

    blocks = -(-count // size)
    out = jax.lax.map(block, jnp.arange(blocks))
    if blocks * size == count:
        return out.reshape(count, -1)
    whole = out[:-1].reshape((blocks - 1) * size, -1)
    return jnp.concatenate([whole, out[-1, whole.shape[0] - last :]])
