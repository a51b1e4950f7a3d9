"""Seven questions about a GPU whose answers decide how generation is written.

    python -m tests.gpu.gpu_probe --json answers.json

It needs jax and numpy only and takes under three minutes on an H200. A question that fails, or for
which no time is left, says so and the others go on. `--tiny` tries it on any machine.
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
from typing import Any, Literal

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
    """How large everything is; the defaults are PaliGemma 3B."""

    width: int = 2048
    hidden: int = 16_384
    heads: int = 8
    head_dim: int = 256
    vocabulary: int = 257_152
    layers: int = 18
    cache: int = 512
    steps: int = 64
    batches: tuple[int, ...] = (1, 8, 64)
    copies: int = 16  # of a matrix, so that none stays in the cache
    long: int = 4096  # tokens of a prefill, of an image at 896 pixels
    chain: int = 300  # kernels one after the other
    megabytes: int = 1024  # to copy to the device


TINY = Sizes(
    width=16, hidden=32, heads=2, head_dim=8, vocabulary=64, layers=2, cache=16, steps=4,
    batches=(1, 2), copies=2, long=16, chain=3, megabytes=1,
)  # fmt: skip
Measured = tuple[float, str, str]  # value, unit, note
Options = dict[str, Any] | None  # of XLA's compiler


def seconds_per_call(call: Callable[[], Any], calls: int = 10, repeats: int = 3) -> float:
    """Least seconds per call among `repeats` runs of `calls`, which are enqueued without waiting.

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
    """The value, unit and note of `measure(*arguments)`, or why there is none."""
    try:
        return Answer(question, case, *measure(*arguments))
    except Exception as e:  # a case that a device or a version does not know ends nothing else
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        return Answer(question, case, None, "", reason[:160])


def compiled_by(compiled: Any) -> str:
    """Which libraries make a program's matmuls, its kernels, and its memory beside its inputs."""
    text = compiled.as_text()
    marks = {"__triton": "Triton", "__cublas$gemm": "cuBLAS", "__cublas$lt": "cuBLASLt",
             "__cudnn": "cuDNN"}  # fmt: skip
    found = ", ".join(name for mark, name in marks.items() if mark in text) or "XLA"
    temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return f"{found}; {_kernels(compiled)} kernels; {temporary:.1f} MB of temporaries"


def _kernels(compiled: Any) -> int:
    return len(Program(compiled.as_text()).kernels())


# (c) cuDNN's attention at this model's head widths: is it right, and how fast is it.

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def cudnn_attention(sizes: Sizes) -> Iterator[Answer]:
    """(c) Against float32 attention by XLA: error and rate for the decoder and the encoder."""
    long, short = sizes.long, max(sizes.long // 4, 4)
    cases = {
        f"decoder, {long} tokens": (1, long, sizes.heads, 1, sizes.head_dim),
        f"decoder, {short} tokens, batch 8": (8, short, sizes.heads, 1, sizes.head_dim),
        f"encoder, {long} tokens": (1, long, 16, 16, 72),
    }
    libraries: tuple[Literal["cudnn", "xla"], ...] = ("cudnn", "xla")
    for name, (batch, tokens, heads, kv_heads, width) in cases.items():
        # Sequences of the decoder differ in length.
        lengths = None if kv_heads > 1 else jnp.arange(tokens - batch, tokens) + 1
        inputs = [
            jax.random.normal(jax.random.key(i), (batch, tokens, n, width), jnp.bfloat16)
            for i, n in enumerate((heads, kv_heads, kv_heads))
        ]
        for library in libraries:
            attend, exact = _attend(lengths, library), _attend(lengths)
            case = f"{library}, {name}"
            yield attempt("c", case, _attention_forward, attend, exact, inputs)
            if batch > 1:
                case += ", with gradients"
                yield attempt("c", case, _attention_backward, attend, exact, inputs)


def _attend(lengths: jax.Array | None, library: Literal["cudnn", "xla"] | None = None) -> Attend:
    """By a library; without one the reference in float32."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if library is None:
            q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, implementation=library
        )

    return jax.jit(attend)


def _attention_forward(attend: Attend, exact: Attend, x: Sequence[jax.Array]) -> Measured:
    q, k, v = x
    error = _error(attend(q, k, v), exact(q, k, v))
    rate = 4 * q.size * q.shape[1] / seconds_per_call(lambda: attend(q, k, v), calls=20)
    return rate / 1e12, "TFLOP/s", f"error {error:.1e}"


def _attention_backward(attend: Attend, exact: Attend, x: Sequence[jax.Array]) -> Measured:
    def gradients(attend: Attend) -> Callable[..., tuple[jax.Array, ...]]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(attend(q, k, v).astype(jnp.float32)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    found = gradients(attend)
    error = max(map(_error, found(*x), gradients(exact)(*x)))
    # Backward takes 2.5 times as many operations as forward.
    rate = 3.5 * 4 * x[0].size * x[0].shape[1] / seconds_per_call(lambda: found(*x))
    return rate / 1e12, "TFLOP/s", f"error {error:.1e}"


def _error(found: jax.Array, exact: jax.Array) -> float:
    """Largest difference relative to the largest number."""
    found, exact = found.astype(jnp.float32), exact.astype(jnp.float32)
    return float(jnp.max(jnp.abs(found - exact)) / jnp.max(jnp.abs(exact)))


# (g) Ways to bring weights to a device.

CHUNKS, THREADS = 16, 4


def copies_to_the_device(sizes: Sizes) -> Iterator[Answer]:
    """(g) One array, chunks, chunks by several threads, pinned memory, and a file."""
    device = jax.devices()[0]
    data = np.random.default_rng(0).integers(0, 256, (CHUNKS, sizes.megabytes << 16), np.uint8)

    def put(x: np.ndarray) -> jax.Array:
        return jax.device_put(x, device)

    def by_threads(read: Callable[[int], np.ndarray]) -> list[jax.Array]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda i: put(read(i)), range(CHUNKS)))

    def pinned() -> Callable[[], Any]:
        here = jax.sharding.SingleDeviceSharding(device)
        staged = jax.device_put(data, here.with_memory_kind("pinned_host"))
        jax.block_until_ready(staged)
        return lambda: jax.device_put(staged, here.with_memory_kind("device"))

    def measure(make: Callable[[], Callable[[], Any]]) -> Measured:
        return data.nbytes / seconds_per_call(make(), calls=1) / 1e9, "GB/s", ""

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        data.tofile(path)
        mapped = np.memmap(path, np.uint8, "r", shape=data.shape)

        def chunk(i: int) -> np.ndarray:
            return np.fromfile(path, np.uint8, data.shape[1], offset=i * data.shape[1])

        ways: dict[str, Callable[[], Callable[[], Any]]] = {
            f"{data.nbytes / 2**20:.0f} MiB at once": lambda: lambda: put(data),
            f"{CHUNKS} chunks": lambda: lambda: [put(chunk) for chunk in data],
            f"{CHUNKS} chunks, {THREADS} threads": lambda: lambda: by_threads(data.__getitem__),
            "from pinned memory": pinned,
            "file, mapped": lambda: lambda: put(mapped),
            f"file, read by {THREADS} threads": lambda: lambda: by_threads(chunk),
        }
        for case, make in ways.items():
            yield attempt("g", case, measure, make)


# (b), (e), (f) Matmuls: which library makes them, and what quantization brings.

Matmul = Callable[[jax.Array, Any], jax.Array]


def chosen_library(sizes: Sizes) -> Iterator[Answer]:
    """(b) Triton or cuBLAS, at batch 1 and larger, as chosen and without Triton."""
    shapes = {"gate and up": (2 * sizes.hidden, sizes.width), "down": (sizes.width, sizes.hidden)}
    choices = {"": None, ", no Triton": {"xla_gpu_enable_triton_gemm": False}}
    for name, shape in shapes.items():
        weights = _random(shape, sizes.copies, jnp.bfloat16)
        for batch in sizes.batches:
            for label, options in choices.items():
                case = f"{name}, batch {batch}{label}"
                yield attempt("b", case, _bandwidth_of, _plain, weights, shape, batch, options)


def four_bits(sizes: Sizes) -> Iterator[Answer]:
    """(e) 8 and 4 bits per weight: a scale for each row of the matrix, or for groups of 64."""
    shape = (2 * sizes.hidden, sizes.width)
    per_row = jnp.ones(shape[:1], jnp.float32)
    per_group = jnp.ones((shape[0], shape[1] // min(64, sizes.width)), jnp.bfloat16)
    fusion = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}
    kinds: list[tuple[str, Matmul, Any, Any, Options]] = [
        ("bfloat16", _plain, jnp.bfloat16, None, None),
        ("int8", _scaled_rows, jnp.int8, per_row, None),
        ("int4", _scaled_rows, jnp.int4, per_row, None),
        ("int4 in groups", _scaled_groups, jnp.int4, per_group, None),
        ("int4 in groups, fused by option", _scaled_groups, jnp.int4, per_group, fusion),
    ]
    for name, matmul, dtype, scale, options in kinds:
        weights: list[Any] = _random(shape, sizes.copies, dtype)
        if scale is not None:
            weights = [(w, scale) for w in weights]
        for batch in sizes.batches:
            case = f"{name}, batch {batch}"
            yield attempt("e", case, _bandwidth_of, matmul, weights, shape, batch, options)


def eight_bit_floats(sizes: Sizes) -> Iterator[Answer]:
    """(f) A prefill's matmul in bfloat16 and in 8-bit floats."""
    tokens, into, out = sizes.long, sizes.width, 2 * sizes.hidden
    x, w = jnp.ones((tokens, into), jnp.bfloat16), jnp.ones((out, into), jnp.bfloat16)
    x8, w8 = x.astype(jnp.float8_e4m3fn), w.astype(jnp.float8_e4m3fn)
    scale = jnp.ones((), jnp.float32)

    def before(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        x, w = (y.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16) for y in (x, w))
        return _dot(x, w).astype(jnp.bfloat16)

    def after(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        return (_dot(x, w) * scale).astype(jnp.bfloat16)

    def measure(matmul: Callable[..., jax.Array], *x: jax.Array) -> Measured:
        compiled = jax.jit(matmul).lower(*x).compile()
        seconds = seconds_per_call(lambda: compiled(*x), calls=20)
        rate = 2 * x[0].shape[0] * x[1].size / seconds / 1e12
        return rate, "TFLOP/s", compiled_by(compiled)

    for name, arguments in (
        ("bfloat16", (_plain, x, w)),
        ("float8, scaled after", (after, x8, w8, scale)),
        ("float8, scaled before (XLA's pattern)", (before, x8, w8, scale)),
    ):
        yield attempt("f", f"{name}, {tokens} tokens", measure, *arguments)


def _bandwidth_of(
    matmul: Matmul, weights: list[Any], shape: tuple[int, int], batch: int, options: Options
) -> Measured:
    """Of weights, over different matrices so that they come from memory."""
    # A different input for each: equal matmuls would be made one.
    size = (len(weights), batch, shape[1])
    xs = list(jax.random.normal(jax.random.key(1), size, jnp.bfloat16))

    def every(xs: list[jax.Array], weights: list[Any]) -> list[jax.Array]:
        return [matmul(x, w) for x, w in zip(xs, weights, strict=True)]

    compiled = jax.jit(every).lower(xs, weights).compile(compiler_options=options)
    seconds = seconds_per_call(lambda: compiled(xs, weights))
    nbytes = sum(
        leaf.size * (0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(weights)
    )
    return nbytes / seconds / 1e9, "GB/s", f"{len(weights)} matmuls: {compiled_by(compiled)}"


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


# (a), (d) A decoding step: what a kernel costs beside its work, and how to go from step to step.
# The decoder is a plain one of PaliGemma 3B's sizes.

Weights = dict[str, Any]
State = dict[str, Any]
Steps = Callable[[Weights, State], State]
_GRAPHS: dict[str, Options] = {"": None, ", no CUDA graphs": {"xla_gpu_enable_command_buffer": ""}}


def cost_of_a_kernel(sizes: Sizes) -> Iterator[Answer]:
    """(a) Time from kernel to kernel: in a chain of small ones, and in a decoding step."""
    x, w = jnp.ones((8, 256), jnp.bfloat16), jnp.eye(256, dtype=jnp.bfloat16)

    def chain(options: Options) -> Measured:
        dots = jax.jit(lambda x, w: functools.reduce(jnp.dot, [w] * sizes.chain, x))
        compiled = dots.lower(x, w).compile(compiler_options=options)
        kernels = _kernels(compiled)
        seconds = seconds_per_call(lambda: compiled(x, w))
        return seconds / kernels * 1e6, "us per kernel", f"{kernels} kernels"

    def read() -> Measured:
        matrix = jnp.ones((sizes.copies * sizes.hidden, sizes.width * 2), jnp.float32)
        total = jax.jit(lambda m: jnp.sum(m, axis=1))
        seconds = seconds_per_call(lambda: total(matrix))
        return matrix.nbytes / seconds / 1e9, "GB/s", f"{matrix.nbytes / 1e6:.0f} MB"

    for label, options in _GRAPHS.items():
        yield attempt("a", f"chain of small kernels{label}", chain, options)
    yield attempt("a", "memory read", read)
    for label, options in _GRAPHS.items():
        yield attempt("a", f"decoding step{label}", _latency, sizes, _step, 1, options)


def ways_to_loop(sizes: Sizes) -> Iterator[Answer]:
    """(d) A loop on the device with a condition, blocks of steps, or one step per call."""

    def with_condition(weights: Weights, state: State) -> State:
        def go_on(state: State) -> jax.Array:
            return (state["length"] < sizes.cache) & (state["left"] > 0) & ~jnp.all(state["done"])

        state = {**state, "left": jnp.int32(sizes.steps)}
        return jax.lax.while_loop(go_on, lambda s: _step(weights, s), state)

    def block(weights: Weights, state: State, steps: int) -> State:
        return jax.lax.scan(lambda s, _: (_step(weights, s), None), state, None, length=steps)[0]

    ways: list[tuple[str, Steps, int]] = [("while_loop, one call", with_condition, sizes.steps)]
    for steps in (8, 32):
        if steps <= sizes.steps:
            ways.append((f"blocks of {steps}", functools.partial(block, steps=steps), steps))
    for name, program, steps in [*ways, ("one step per call", _step, 1)]:
        yield attempt("d", name, _latency, sizes, program, steps)


def _latency(sizes: Sizes, program: Steps, per_call: int, options: Options = None) -> Measured:
    """Milliseconds per token, least of three runs; calls follow one another without waiting."""
    weights, state = _model(sizes)
    lowered = jax.jit(program, donate_argnums=1).lower(weights, state)
    compiled = lowered.compile(compiler_options=options)
    calls, times = sizes.steps // per_call, []
    for _ in range(3):
        jax.block_until_ready(compiled(weights, jax.tree.map(jnp.copy, state)))
        current = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        start = time.perf_counter()
        for _ in range(calls):
            current = compiled(weights, current)
        jax.block_until_ready(current)
        times.append((time.perf_counter() - start) / (calls * per_call))
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    rate = f"{nbytes / min(times) / 1e9:.0f} GB/s of weights"
    return min(times) * 1e3, "ms/token", f"{rate}; {compiled_by(compiled)}"


@functools.lru_cache(maxsize=1)
def _model(sizes: Sizes) -> tuple[Weights, State]:
    """Random weights, contracted axes last, and a state with an empty cache; batch 1."""
    s, dtype = sizes, jnp.bfloat16
    shapes = {
        "qkv": ((s.heads + 2) * s.head_dim, s.width),
        "out": (s.width, s.heads * s.head_dim),
        "gate_up": (2 * s.hidden, s.width),
        "down": (s.width, s.hidden),
    }

    @functools.partial(jax.jit, static_argnames="shape")
    def draw(number: int, shape: tuple[int, ...]) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), number)
        return (jax.random.normal(key, shape) * 0.02).astype(dtype)

    layers = [
        {name: draw(4 * layer + i, shape) for i, (name, shape) in enumerate(shapes.items())}
        for layer in range(s.layers)
    ]
    state = {
        "token": jnp.ones((1,), jnp.int32),
        "done": jnp.zeros((1,), bool),
        "length": jnp.int32(0),
        "left": jnp.int32(0),
        **{
            name: [jnp.zeros((1, 1, s.cache, s.head_dim), dtype) for _ in range(s.layers)]
            for name in "kv"
        },
    }
    return {"embedding": draw(-1, (s.vocabulary, s.width)), "layers": layers}, state


def _step(weights: Weights, state: State) -> State:
    """One token through all layers, and the greedy next one."""
    embedding, length = weights["embedding"], state["length"]
    x = embedding[state["token"]].astype(jnp.float32)
    visible = jnp.arange(state["k"][0].shape[2]) <= length
    keys, values = [], []
    for layer, k, v in zip(weights["layers"], state["k"], state["v"], strict=True):
        head_dim = k.shape[-1]
        qkv = _dot(_norm(x), layer["qkv"]).reshape(1, -1, head_dim)
        q, new_k, new_v = qkv[:, :-2], qkv[:, -2:-1], qkv[:, -1:]
        at = (0, 0, length, 0)
        k = jax.lax.dynamic_update_slice(k, _rope(new_k, length)[:, :, None], at)
        v = jax.lax.dynamic_update_slice(v, new_v.astype(v.dtype)[:, :, None], at)
        keys, values = [*keys, k], [*values, v]
        q = _rope(q, length)[:, None] * jnp.asarray(head_dim**-0.5, k.dtype)
        logits = jnp.einsum("bkgh,bksh->bkgs", q, k, preferred_element_type=jnp.float32)
        attention = jax.nn.softmax(jnp.where(visible, logits, -1e30), axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bkgs,bksh->bkgh", attention, v, preferred_element_type=jnp.float32)
        x = x + _dot(mixed.reshape(1, -1).astype(v.dtype), layer["out"])
        gate, up = jnp.split(_dot(_norm(x), layer["gate_up"]).astype(v.dtype), 2, axis=-1)
        x = x + _dot(jax.nn.gelu(gate, approximate=True) * up, layer["down"])
    token = jnp.argmax(_dot(_norm(x), embedding), axis=-1).astype(jnp.int32)
    done, left = state["done"] | (token < 0), state["left"] - 1
    return {
        "token": token,
        "done": done,
        "length": length + 1,
        "left": left,
        "k": keys,
        "v": values,
    }


def _norm(x: jax.Array) -> jax.Array:
    return (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)).astype(jnp.bfloat16)


def _rope(x: jax.Array, position: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angle = position / 10_000 ** (jnp.arange(half) / half)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half], x[..., half:]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(jnp.bfloat16)


HEAD = ("| question | case | value | note |", "|---|---|---|---|")  # of the table
QUESTIONS: dict[str, Callable[[Sizes], Iterator[Answer]]] = {
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
