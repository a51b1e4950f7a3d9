"""A decoding step on a GPU: what a kernel costs beside its work, and how to go from step to step.

The decoder is a plain one of PaliGemma 3B's sizes, with what a step costs and nothing else.
"""

import functools
import time
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
from paligemma_jax.benchmark.device_products import temporaries
from paligemma_jax.benchmark.hlo import Program

Weights = dict[str, Any]
State = dict[str, Any]
Steps = Callable[[Weights, State], State]
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


def cost_of_a_kernel(sizes: Sizes) -> Iterator[Answer]:
    """(a) Time from kernel to kernel: in a chain of small ones, and in a decoding step."""
    choices = {"": None, ", no CUDA graphs": NO_GRAPHS}
    for label, options in choices.items():
        yield attempt("a", f"chain of small kernels{label}", _chain, sizes.chain, options)
    yield attempt("a", "memory read", _bandwidth, sizes)
    for label, options in choices.items():
        yield attempt("a", f"decoding step{label}", _one_way, sizes, _step, 1, options)


def ways_to_loop(sizes: Sizes) -> Iterator[Answer]:
    """(d) A loop on the device with a condition, blocks of steps, or a step for each call."""

    def with_condition(weights: Weights, state: State) -> State:
        def go_on(state: State) -> jax.Array:
            return (state["length"] < sizes.slots) & (state["left"] > 0) & ~jnp.all(state["done"])

        state = {**state, "left": jnp.int32(sizes.steps)}
        return jax.lax.while_loop(go_on, lambda s: _step(weights, s), state)

    def block(weights: Weights, state: State, steps: int) -> State:
        return jax.lax.scan(lambda s, _: (_step(weights, s), None), state, None, length=steps)[0]

    ways: list[tuple[str, Steps, int]] = [("while_loop, one call", with_condition, sizes.steps)]
    for steps in (8, 32):
        if steps <= sizes.steps:
            ways.append((f"blocks of {steps}", functools.partial(block, steps=steps), steps))
    for name, program, steps in [*ways, ("a call a step", _step, 1)]:
        yield attempt("d", name, _one_way, sizes, program, steps)


def _chain(length: int, options: dict[str, Any] | None) -> Measured:
    x, w = jnp.ones((8, 256), jnp.bfloat16), jnp.eye(256, dtype=jnp.bfloat16)

    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(length):
            x = jnp.dot(x, w)
        return x

    compiled = jax.jit(chain).lower(x, w).compile(compiler_options=options)
    kernels = _kernels(compiled)
    seconds = seconds_per_call(lambda: compiled(x, w))
    return seconds / kernels * 1e6, "us a kernel", f"{kernels} kernels"


def _bandwidth(sizes: Sizes) -> Measured:
    matrix = jnp.ones((sizes.copies * sizes.hidden, sizes.width * 2), jnp.float32)
    read = jax.jit(lambda m: jnp.sum(m, axis=1))
    seconds = seconds_per_call(lambda: read(matrix))
    return matrix.nbytes / seconds / 1e9, "GB/s", f"{matrix.nbytes / 1e6:.0f} MB"


def _one_way(
    sizes: Sizes,
    program: Steps,
    steps_a_call: int,
    options: dict[str, Any] | None = None,
) -> Measured:
    """Milliseconds a token over `sizes.steps` tokens."""
    weights, state = _make(sizes)
    lowered = jax.jit(program, donate_argnums=1).lower(weights, state)
    compiled = lowered.compile(compiler_options=options)
    calls = sizes.steps // steps_a_call
    seconds = _seconds_a_step(lambda s: compiled(weights, s), state, calls, steps_a_call)
    rate = f"{_nbytes(weights) / seconds / 1e9:.0f} GB/s of weights"
    note = f"{rate}; {_kernels(compiled)} kernels; {temporaries(compiled)}"
    return seconds * 1e3, "ms a token", note


def _kernels(compiled: Any) -> int:
    return len(Program(compiled.as_text()).kernels())


def _seconds_a_step(
    call: Callable[[State], State], state: State, calls: int, steps_a_call: int
) -> float:
    """Least of three runs; calls follow one another without waiting, as generation does."""
    times = []
    for _ in range(3):
        current = call(jax.tree.map(jnp.copy, state))
        jax.block_until_ready(current)
        current = jax.tree.map(jnp.copy, state)
        jax.block_until_ready(current)
        start = time.perf_counter()
        for _ in range(calls):
            current = call(current)
        jax.block_until_ready(current)
        times.append((time.perf_counter() - start) / (calls * steps_a_call))
    return min(times)


@functools.lru_cache(maxsize=1)
def _make(sizes: Sizes) -> tuple[Weights, State]:
    """Random weights, contracted axes last, and a state with an empty cache; batch 1."""
    s, dtype = sizes, jnp.bfloat16
    shapes = {
        "qkv": ((s.heads + 2) * s.head_dim, s.width),
        "out": (s.width, s.heads * s.head_dim),
        "gate_up": (2 * s.hidden, s.width),
        "down": (s.width, s.hidden),
    }
    key = jax.random.key(0)

    @functools.partial(jax.jit, static_argnames="shape")
    def draw(number: int, shape: tuple[int, ...]) -> jax.Array:
        return (jax.random.normal(jax.random.fold_in(key, number), shape) * 0.02).astype(dtype)

    layers = [
        {name: draw(4 * layer + i, shape) for i, (name, shape) in enumerate(shapes.items())}
        for layer in range(s.layers)
    ]
    cache = [jnp.zeros((1, 1, s.slots, s.head_dim), dtype) for _ in range(s.layers)]
    state = {
        "token": jnp.ones((1,), jnp.int32),
        "done": jnp.zeros((1,), bool),
        "length": jnp.int32(0),
        "left": jnp.int32(0),
        "k": cache,
        "v": [jnp.zeros_like(c) for c in cache],
    }
    return {"table": draw(-1, (s.vocabulary, s.width)), "layers": layers}, state


def _step(weights: Weights, state: State) -> State:
    """One token through all layers, and the likeliest next one."""
    table, length = weights["table"], state["length"]
    x = table[state["token"]].astype(jnp.float32)
    seen = jnp.arange(state["k"][0].shape[2]) <= length
    keys, values = [], []
    for layer, k, v in zip(weights["layers"], state["k"], state["v"], strict=True):
        head_dim = k.shape[-1]
        qkv = _dot(_norm(x), layer["qkv"]).reshape(1, -1, head_dim)
        q, new_k, new_v = qkv[:, :-2], qkv[:, -2:-1], qkv[:, -1:]
        at = (0, 0, length, 0)
        k = jax.lax.dynamic_update_slice(k, _rotate(new_k, length)[:, :, None], at)
        v = jax.lax.dynamic_update_slice(v, new_v.astype(v.dtype)[:, :, None], at)
        keys, values = [*keys, k], [*values, v]
        q = _rotate(q, length)[:, None] * jnp.asarray(head_dim**-0.5, k.dtype)
        logits = jnp.einsum("bkgh,bksh->bkgs", q, k, preferred_element_type=jnp.float32)
        share = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bkgs,bksh->bkgh", share, v, preferred_element_type=jnp.float32)
        x = x + _dot(mixed.reshape(1, -1).astype(v.dtype), layer["out"])
        gate, up = jnp.split(_dot(_norm(x), layer["gate_up"]).astype(v.dtype), 2, axis=-1)
        x = x + _dot(jax.nn.gelu(gate, approximate=True) * up, layer["down"])
    token = jnp.argmax(_dot(_norm(x), table), axis=-1).astype(jnp.int32)
    return {
        **state,
        "token": token,
        "done": state["done"] | (token < 0),
        "length": length + 1,
        "left": state["left"] - 1,
        "k": keys,
        "v": values,
    }


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("ri,oi->ro", x, w, preferred_element_type=jnp.float32)


def _norm(x: jax.Array) -> jax.Array:
    return (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)).astype(jnp.bfloat16)


def _rotate(x: jax.Array, position: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angle = position / 10_000 ** (jnp.arange(half) / half)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half], x[..., half:]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(jnp.bfloat16)


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
