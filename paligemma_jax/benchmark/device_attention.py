"""(c) cuDNN's attention at this model's head widths: is it right, and how fast is it."""

from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from paligemma_jax.benchmark.device_answers import (
    Answer,
    Measured,
    Sizes,
    attempt,
    seconds_per_call,
)

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Inputs = tuple[jax.Array, jax.Array, jax.Array]
LIBRARIES: tuple[Literal["cudnn", "xla"], ...] = ("cudnn", "xla")


def cudnn_attention(sizes: Sizes) -> Iterator[Answer]:
    """(c) Against float32 attention by XLA: error and rate for the decoder and the encoder."""
    long, short = sizes.long, max(sizes.long // 4, 4)
    cases = {
        f"decoder, {long} tokens": (1, long, sizes.heads, 1, sizes.head_dim),
        f"decoder, {short} tokens, 8 rows": (8, short, sizes.heads, 1, sizes.head_dim),
        f"encoder, {long} tokens": (1, long, 16, 16, 72),
    }
    for name, (batch, tokens, heads, kv_heads, width) in cases.items():
        # Rows of the decoder differ in length.
        lengths = None if kv_heads > 1 else jnp.arange(tokens - batch, tokens) + 1
        inputs = _inputs(batch, tokens, heads, kv_heads, width)
        for library in LIBRARIES:
            case, attend = f"{library}, {name}", _attend(library, lengths)
            yield attempt("c", case, _forwards, attend, _reference(lengths), inputs)
            if batch > 1:
                case = f"{case}, with gradients"
                yield attempt("c", case, _backwards, attend, _reference(lengths), inputs)


def _inputs(batch: int, tokens: int, heads: int, kv_heads: int, width: int) -> Inputs:
    def draw(seed: int, heads: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), (batch, tokens, heads, width), jnp.bfloat16)

    return draw(0, heads), draw(1, kv_heads), draw(2, kv_heads)


def _operations(q: jax.Array) -> int:
    return 4 * q.size * q.shape[1]


def _forwards(attend: Attend, right: Attend, x: Inputs) -> Measured:
    error = _error(attend(*x), right(*x))
    rate = _operations(x[0]) / seconds_per_call(lambda: attend(*x), calls=20)
    return rate / 1e12, "TFLOP/s", f"error {error:.1e}"


def _backwards(attend: Attend, right: Attend, x: Inputs) -> Measured:
    gradients = _gradients(attend)
    error = max(map(_error, gradients(*x), _gradients(right)(*x)))
    seconds = seconds_per_call(lambda: gradients(*x))
    # Backwards takes 2.5 times as many operations as forwards.
    return 3.5 * _operations(x[0]) / seconds / 1e12, "TFLOP/s", f"error {error:.1e}"


def _attend(library: Literal["cudnn", "xla"], lengths: jax.Array | None) -> Attend:
    return jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, implementation=library
        )
    )


def _reference(lengths: jax.Array | None) -> Attend:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)

    return jax.jit(attend)


def _gradients(attend: Attend) -> Callable[..., tuple[jax.Array, ...]]:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attend(q, k, v).astype(jnp.float32)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def _error(found: jax.Array, right: jax.Array) -> float:
    """Largest difference as a part of the largest number."""
    found, right = found.astype(jnp.float32), right.astype(jnp.float32)
    return float(jnp.max(jnp.abs(found - right)) / jnp.max(jnp.abs(right)))
