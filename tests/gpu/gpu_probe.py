"""Seven questions about a GPU whose answers decide how generation is written.

    python -m tests.gpu.gpu_probe --json answers.json

Needs jax and numpy only. Takes under three minutes on an H200; a question that fails, or for which
no time is left, says so and the others go on. `--tiny` is for trying it, on any machine.

What a question to a device brings: rows of a table, and how the time was taken.

(c) cuDNN's attention at this model's head widths: is it right, and how fast is it.

(g) Ways to bring weights to a device: gigabytes a second of each.

Reads what XLA compiled: the kernels that one run of a program starts, and what they write.

Products of matrices on a GPU: which library makes them, and what few bits a weight bring.

A decoding step on a GPU: what a kernel costs beside its work, and how to go from step to step.

The decoder is a plain one of PaliGemma 3B's sizes, with what a step costs and nothing else.
"""

import argparse
import dataclasses
import functools
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tests.program.hlo import Program


@dataclasses.dataclass(frozen=True)
class Answer:
    """One measured number; `note` says what was seen besides, or why there is no number."""

    question: str
    case: str
    value: float | None
    unit: str
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is; what is given here is PaliGemma 3B."""

    width: int = 2048
    hidden: int = 16_384
    heads: int = 8
    head_dim: int = 256
    vocabulary: int = 257_152
    layers: int = 18
    slots: int = 512
    steps: int = 64
    rows: tuple[int, ...] = (1, 8, 64)
    copies: int = 16  # of a matrix, so that none stays in the cache
    long: int = 4096  # tokens of a prefill, of an image at 896 pixels
    chain: int = 300  # kernels one after the other
    megabytes: int = 1024  # to copy to the device


TINY = Sizes(
    width=16,
    hidden=32,
    heads=2,
    head_dim=8,
    vocabulary=64,
    layers=2,
    slots=16,
    steps=4,
    rows=(1, 2),
    copies=2,
    long=16,
    chain=3,
    megabytes=1,
)


Measured = tuple[float, str, str]  # value, unit, note


class Question(Protocol):
    """Yields answers; what it raises is noted, and the next question is asked."""

    def __call__(self, sizes: Sizes) -> Iterator[Answer]: ...


def seconds_per_call(call: Callable[[], Any], calls: int = 10, repeats: int = 3) -> float:
    """Least seconds of a call among `repeats` runs of `calls`, which are sent off without waiting.

    The first call compiles and is not counted.
    """
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        results = [call() for _ in range(calls)]
        jax.block_until_ready(results[-1])
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def attempt(question: str, case: str, measure: Callable[..., Measured], *arguments: Any) -> Answer:
    """A row with the value, unit and note of `measure(*arguments)`, or with why there is none."""
    try:
        return Answer(question, case, *measure(*arguments))
    except Exception as e:  # a case that a device or a version does not know ends nothing else
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        return Answer(question, case, None, "", reason[:160])


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


CHUNKS = 16
THREADS = 4


def copies_to_the_device(sizes: Sizes) -> Iterator[Answer]:
    """(g) One array, chunks, chunks by several threads, pinned memory, and a file."""
    device = jax.devices()[0]
    data = np.random.default_rng(0).integers(0, 256, (CHUNKS, sizes.megabytes << 16), np.uint8)

    def put(x: np.ndarray) -> jax.Array:
        return jax.device_put(x, device)

    def by_threads() -> list[jax.Array]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(put, data))

    def pinned() -> Callable[[], Any]:
        here = jax.sharding.SingleDeviceSharding(device)
        staged = jax.device_put(data, here.with_memory_kind("pinned_host"))
        jax.block_until_ready(staged)
        return lambda: jax.device_put(staged, here.with_memory_kind("device"))

    def measure(make: Callable[[], Callable[[], Any]]) -> Measured:
        return data.nbytes / seconds_per_call(make(), calls=1) / 1e9, "GB/s", ""

    ways: list[tuple[str, Callable[[], Callable[[], Any]]]] = [
        (f"{data.nbytes / 2**20:.0f} MiB at once", lambda: lambda: put(data)),
        (f"{CHUNKS} chunks", lambda: lambda: [put(chunk) for chunk in data]),
        (f"{CHUNKS} chunks, {THREADS} threads", lambda: by_threads),
        ("from pinned memory", pinned),
    ]
    for case, make in ways:
        yield attempt("g", case, measure, make)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        data.tofile(path)
        mapped = np.memmap(path, np.uint8, "r", shape=data.shape)

        def read_by_threads() -> list[jax.Array]:
            def part(number: int) -> jax.Array:
                with path.open("rb") as file:
                    file.seek(number * data.shape[1])
                    return put(np.frombuffer(file.read(data.shape[1]), np.uint8))

            with ThreadPoolExecutor(THREADS) as pool:
                return list(pool.map(part, range(CHUNKS)))

        yield attempt("g", "file, mapped", measure, lambda: lambda: put(mapped))
        yield attempt("g", f"file, read by {THREADS} threads", measure, lambda: read_by_threads)


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
        return _device_products_dot(x, w).astype(jnp.bfloat16)

    def scaled(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        return (_device_products_dot(x, w) * scale).astype(jnp.bfloat16)

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
    size = sum(_device_products_nbytes(leaf) for leaf in jax.tree.leaves(weights))
    note = f"{libraries(compiled)} for {len(weights)}; {temporaries(compiled)}"
    return size / seconds / 1e9, "GB/s", note


def _device_products_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("ri,oi->ro", x, w, preferred_element_type=jnp.float32)


def _plain(x: jax.Array, w: Any) -> jax.Array:
    return _device_products_dot(x, w).astype(x.dtype)


def _scaled_rows(x: jax.Array, weights: Any) -> jax.Array:
    w, scale = weights
    return (_device_products_dot(x, w.astype(x.dtype)) * scale).astype(x.dtype)


def _scaled_groups(x: jax.Array, weights: Any) -> jax.Array:
    w, scale = weights
    groups = w.astype(x.dtype).reshape(*scale.shape, -1) * scale[..., None]
    return _device_products_dot(x, groups.reshape(w.shape)).astype(x.dtype)


def _random(shape: tuple[int, int], number: int, dtype: Any) -> list[jax.Array]:
    make = jax.jit(lambda key: (jax.random.normal(key, shape) * 2).astype(dtype))
    return [make(jax.random.key(i)) for i in range(number)]


def _device_products_nbytes(leaf: jax.Array) -> float:
    return leaf.size * (0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize)


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
    rate = f"{_device_decoding_nbytes(weights) / seconds / 1e9:.0f} GB/s of weights"
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
        qkv = _device_decoding_dot(_norm(x), layer["qkv"]).reshape(1, -1, head_dim)
        q, new_k, new_v = qkv[:, :-2], qkv[:, -2:-1], qkv[:, -1:]
        at = (0, 0, length, 0)
        k = jax.lax.dynamic_update_slice(k, _rotate(new_k, length)[:, :, None], at)
        v = jax.lax.dynamic_update_slice(v, new_v.astype(v.dtype)[:, :, None], at)
        keys, values = [*keys, k], [*values, v]
        q = _rotate(q, length)[:, None] * jnp.asarray(head_dim**-0.5, k.dtype)
        logits = jnp.einsum("bkgh,bksh->bkgs", q, k, preferred_element_type=jnp.float32)
        share = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bkgs,bksh->bkgh", share, v, preferred_element_type=jnp.float32)
        x = x + _device_decoding_dot(mixed.reshape(1, -1).astype(v.dtype), layer["out"])
        gate, up = jnp.split(
            _device_decoding_dot(_norm(x), layer["gate_up"]).astype(v.dtype), 2, axis=-1
        )
        x = x + _device_decoding_dot(jax.nn.gelu(gate, approximate=True) * up, layer["down"])
    token = jnp.argmax(_device_decoding_dot(_norm(x), table), axis=-1).astype(jnp.int32)
    return {
        **state,
        "token": token,
        "done": state["done"] | (token < 0),
        "length": length + 1,
        "left": state["left"] - 1,
        "k": keys,
        "v": values,
    }


def _device_decoding_dot(x: jax.Array, w: jax.Array) -> jax.Array:
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


def _device_decoding_nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


HEAD = ("| question | case | value | seen |", "|---|---|---|---|")  # of the table
QUESTIONS: dict[str, Question] = {
    "a": cost_of_a_kernel,
    "d": ways_to_loop,
    "c": cudnn_attention,
    "g": copies_to_the_device,
    "f": eight_bit_floats,
    "b": chosen_library,
    "e": four_bits,
}


def ask(names: Sequence[str], sizes: Sizes, seconds: float) -> list[Answer]:
    """Answers to the questions of these letters, in turn, until the time is over."""
    answers: list[Answer] = []
    start = time.monotonic()
    for name in names:
        began = time.monotonic()
        try:
            for answer in QUESTIONS[name](sizes):
                answers.append(answer)
                print(_line(answer), file=sys.stderr, flush=True)
                if time.monotonic() - start > seconds:
                    answers.append(Answer(name, "the rest", None, "", "no time was left"))
                    break
        except Exception as e:  # one question must not cost the others their answers
            answers.append(Answer(name, "all", None, "", f"{type(e).__name__}: {e}"[:160]))
        took = time.monotonic() - began
        answers.append(Answer(name, "time to find out", round(took, 1), "s"))
    return answers


def markdown(answers: Sequence[Answer]) -> str:
    """The answers as a table."""
    return "\n".join([*HEAD, *(_line(answer) for answer in answers)])


def _line(answer: Answer) -> str:
    value = "-" if answer.value is None else f"{answer.value:.4g} {answer.unit}"
    note = answer.note.replace("|", "/")
    return f"| {answer.question} | {answer.case} | {value} | {note} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the answers")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the questions")
    parser.add_argument("--seconds", type=float, default=170.0, help="when to stop")
    parser.add_argument("--questions", default="".join(QUESTIONS), help="letters, e.g. ad")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.questions) - set(QUESTIONS))
    if unknown:
        parser.error(f"no question {unknown[0]!r}; there are {''.join(sorted(QUESTIONS))}")
    device = jax.devices()[0]
    about = {
        "device": getattr(device, "device_kind", str(device)),
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(about), file=sys.stderr, flush=True)
    answers = ask(options.questions, TINY if options.tiny else Sizes(), options.seconds)
    found = {**about, "answers": [dataclasses.asdict(answer) for answer in answers]}
    print(markdown(answers))
    print(json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
