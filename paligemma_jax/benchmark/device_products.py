"""Products of matrices on a GPU: which library makes them, and what few bits a weight bring."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from paligemma_jax.benchmark.device_answers import (
    Answer,
    Measured,
    Sizes,
    attempt,
    seconds_per_call,
)
from paligemma_jax.benchmark.hlo import Program

GROUP = 64  # weights of 4 bits that share a scale, as in `Int4`
SUBCHANNEL = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}
Product = Callable[[jax.Array, Any], jax.Array]


def chosen_library(sizes: Sizes) -> Iterator[Answer]:
    """(b) Triton or cuBLAS, at one row and at many, as chosen and without Triton."""
    shapes = {"gate and up": (2 * sizes.hidden, sizes.width), "down": (sizes.width, sizes.hidden)}
    choices = {"": None, ", no Triton": {"xla_gpu_enable_triton_gemm": False}}
    for name, shape in shapes.items():
        weights = _random(shape, sizes.copies, jnp.bfloat16)
        for rows in sizes.rows:
            for label, options in choices.items():
                case = f"{name}, {rows} rows{label}"
                yield attempt("b", case, _product, _plain, weights, shape, rows, options)


def four_bits(sizes: Sizes) -> Iterator[Answer]:
    """(e) 8 and 4 bits a weight: a scale for each row of the matrix, or for groups of 64."""
    shape = (2 * sizes.hidden, sizes.width)
    group = min(GROUP, sizes.width)
    per_row = jnp.ones(shape[:1], jnp.float32)
    per_group = jnp.ones((shape[0], shape[1] // group), jnp.bfloat16)
    kinds: list[tuple[str, Product, Any, Any, Any]] = [
        ("bfloat16", _plain, jnp.bfloat16, None, None),
        ("int8", _scaled_rows, jnp.int8, per_row, None),
        ("int4", _scaled_rows, jnp.int4, per_row, None),
        ("int4 in groups", _scaled_groups, jnp.int4, per_group, None),
        ("int4 in groups, fused by option", _scaled_groups, jnp.int4, per_group, SUBCHANNEL),
    ]
    for name, product, dtype, scale, options in kinds:
        weights = _random(shape, sizes.copies, dtype)
        if scale is not None:
            weights = [(w, scale) for w in weights]
        for rows in sizes.rows:
            case = f"{name}, {rows} rows"
            yield attempt("e", case, _product, product, weights, shape, rows, options)


def eight_bit_floats(sizes: Sizes) -> Iterator[Answer]:
    """(f) A prefill's product in bfloat16 and in 8-bit floats."""
    rows, into, out = sizes.long, sizes.width, 2 * sizes.hidden
    x, w = jnp.ones((rows, into), jnp.bfloat16), jnp.ones((out, into), jnp.bfloat16)
    x8, w8 = x.astype(jnp.float8_e4m3fn), w.astype(jnp.float8_e4m3fn)
    scale = jnp.ones((), jnp.float32)

    def widened(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        x, w = (y.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16) for y in (x, w))
        return _dot(x, w).astype(jnp.bfloat16)

    def scaled(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        return (_dot(x, w) * scale).astype(jnp.bfloat16)

    kinds: list[tuple[str, Callable[..., jax.Array], tuple[jax.Array, ...]]] = [
        ("bfloat16", _plain, (x, w)),
        ("float8, scaled after", scaled, (x8, w8, scale)),
        ("float8, scaled before (XLA's pattern)", widened, (x8, w8, scale)),
    ]
    for name, product, arguments in kinds:
        yield attempt("f", f"{name}, {rows} rows", _large_product, product, arguments)


def _large_product(product: Callable[..., jax.Array], x: tuple[jax.Array, ...]) -> Measured:
    compiled = jax.jit(product).lower(*x).compile()
    seconds = seconds_per_call(lambda: compiled(*x), calls=20)
    return 2 * x[0].shape[0] * x[1].size / seconds / 1e12, "TFLOP/s", libraries(compiled)


def libraries(compiled: Any) -> str:
    """What makes a program's products, and how many kernels it has."""
    text = compiled.as_text()
    found = [name for mark, name in _LIBRARIES.items() if mark in text]
    return f"{', '.join(found) or 'XLA'}; {len(Program(text).kernels())} kernels"


def temporaries(compiled: Any) -> str:
    """How much memory a program takes beside what it is given and gives."""
    return f"{compiled.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB of temporaries"


_LIBRARIES = {
    "__triton": "Triton",
    "__cublas$gemm": "cuBLAS",
    "__cublas$lt": "cuBLASLt",
    "__cudnn": "cuDNN",
}


def _product(
    product: Product,
    weights: list[Any],
    shape: tuple[int, int],
    rows: int,
    options: dict[str, Any] | None,
) -> Measured:
    """Gigabytes of weights a second, over different matrices so that they come from memory."""
    key = jax.random.key(1)
    # Different rows for each: products of the same ones would be made one.
    xs = list(jax.random.normal(key, (len(weights), rows, shape[1]), jnp.bfloat16))

    def every(xs: list[jax.Array], weights: list[Any]) -> list[jax.Array]:
        return [product(x, w) for x, w in zip(xs, weights, strict=True)]

    compiled = jax.jit(every).lower(xs, weights).compile(compiler_options=options)
    seconds = seconds_per_call(lambda: compiled(xs, weights))
    size = sum(_nbytes(leaf) for leaf in jax.tree.leaves(weights))
    note = f"{libraries(compiled)} for {len(weights)}; {temporaries(compiled)}"
    return size / seconds / 1e9, "GB/s", note


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("ri,oi->ro", x, w, preferred_element_type=jnp.float32)


def _plain(x: jax.Array, w: Any) -> jax.Array:
    return _dot(x, w).astype(x.dtype)


def _scaled_rows(x: jax.Array, weights: Any) -> jax.Array:
    w, scale = weights
    return (_dot(x, w.astype(x.dtype)) * scale).astype(x.dtype)


def _scaled_groups(x: jax.Array, weights: Any) -> jax.Array:
    w, scale = weights
    groups = w.astype(x.dtype).reshape(*scale.shape, -1) * scale[..., None]
    return _dot(x, groups.reshape(w.shape)).astype(x.dtype)


def _random(shape: tuple[int, int], number: int, dtype: Any) -> list[jax.Array]:
    make = jax.jit(lambda key: (jax.random.normal(key, shape) * 2).astype(dtype))
    return [make(jax.random.key(i)) for i in range(number)]


def _nbytes(leaf: jax.Array) -> float:
    return leaf.size * (0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize)
