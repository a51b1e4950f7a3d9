"""This library as a subject, run as its users run it; and big_vision's way of decoding.

big_vision itself needs TensorFlow. What it does is short enough to do here: a scanned model,
float32 activations, a bfloat16 KV cache, and a Python loop that calls one compiled step per token.
The step is this library's own. big_vision also looks at every token before it asks for the next;
that is left out, in its favor.
"""

import collections
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paligemma_jax.benchmark import Precision
from paligemma_jax.benchmark.measure import (
    Sample,
    Stopwatch,
    peak_resident,
    reset_peak_resident,
)
from paligemma_jax.benchmark.subjects import Prompts
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.generation import decode as decoding
from paligemma_jax.generation.generate import MIN_CAPACITY, generate
from paligemma_jax.models.inference_layout import abstract_unstacked
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma, from_params
from paligemma_jax.models.quantization import abstract_quantized
from paligemma_jax.processing.processor import MIN_TEXT_LENGTH, Batch, bucket
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.load import load_stacked, load_unstacked

DEFAULT_LENGTH = 64  # new tokens that a cache has room for where none are asked for


class Ours:
    """A model as a `Subject`, and what only it is asked."""

    def __init__(self, model: PaliGemma):
        self.model = model

    def encode_images(self, images: np.ndarray) -> Callable[[], object]:
        pixels = jnp.asarray(images)
        return lambda: jax.block_until_ready(_encode(self.model, pixels))

    def first_token(self, prompts: Prompts) -> Callable[[], np.ndarray]:
        batch = prompt_batch(prompts)

        def call() -> np.ndarray:
            logits, _ = decoding.read_prompts(self.model, batch, room=DEFAULT_LENGTH)
            return np.asarray(_argmax(logits))

        return call

    def generate(self, prompts: Prompts, new_tokens: int) -> Callable[[], np.ndarray]:
        batch = prompt_batch(prompts)
        return lambda: self._generate(batch, new_tokens)

    def logits(self, prompts: Prompts) -> np.ndarray:
        batch = prompt_batch(prompts)
        return np.asarray(decoding.read_prompts(self.model, batch, room=DEFAULT_LENGTH)[0])

    def generate_text(self, tokens: np.ndarray, *, new_tokens: int) -> None:
        """Without an image, the prompt padded as a `Processor` does it."""
        length = tokens.shape[1]
        padding = bucket(length, MIN_TEXT_LENGTH) - length
        real = np.broadcast_to(
            np.arange(length + padding) < length, (len(tokens), length + padding)
        )
        batch = Batch(
            images=None,
            tokens=np.pad(tokens, ((0, 0), (0, padding))),
            mask_ar=(~real).astype(np.int32),
            mask_input=real,
        )
        self._generate(batch, new_tokens)

    def _generate(self, batch: Batch, new_tokens: int) -> np.ndarray:
        found = generate(self.model, batch, max_new_tokens=new_tokens, eos_token_id=())
        return np.array([generation.tokens for generation in found], np.int32)

    def peak_bytes(self) -> int:
        return peak_bytes()

    def decode(self, prompts: Prompts, new_tokens: int) -> Callable[[], Sample]:
        prefill, decode = self.prefill_and_decode(prompts, new_tokens)
        prefill()
        decode(2)

        def call() -> Sample:
            prefill()
            watch = Stopwatch()
            decode(new_tokens)
            return watch.stop()

        return call

    def prefill_and_decode(
        self, prompts: Prompts, new_tokens: int
    ) -> tuple[Callable[[], KVCache], Callable[[int], np.ndarray]]:
        """Two calls, to be made in turn; the second one decodes up to so many tokens."""
        batch, size = prompt_batch(prompts), len(prompts[1])
        capacity = bucket(new_tokens, MIN_CAPACITY)
        inputs: list[tuple[jax.Array, KVCache]] = []

        def prefill() -> KVCache:
            found = decoding.read_prompts(self.model, batch, room=capacity)
            inputs[:] = [jax.block_until_ready(found)]
            return inputs[0][1]

        def decode(limit: int) -> np.ndarray:
            logits, cache = inputs.pop()
            plan = decoding.DecodePlan.greedy(size, limit, eos_token_id=None)
            state = decoding.decode(self.model, plan, cache, logits, jnp.ones(size, bool), capacity)
            return np.asarray(state.progress.tokens)

        return prefill, decode


def load_ours(weights: Path, dtype: Precision) -> Ours:
    """Loads a checkpoint as `from_pretrained` does, but without a tokenizer."""
    with open_checkpoint(weights) as checkpoint:
        quantize = dtype.value if dtype.quantized else None
        model = load_unstacked(checkpoint, dtype.floats.value, quantize=quantize)
    return Ours(jax.block_until_ready(model))


def prompt_batch(prompts: Prompts) -> Batch:
    """One image and one prompt without padding per sequence, on the device."""
    images, tokens = prompts
    return Batch(
        images=jnp.asarray(images[:, None]),
        tokens=jnp.asarray(tokens),
        mask_ar=jnp.zeros(tokens.shape, jnp.int32),
        mask_input=jnp.ones(tokens.shape, bool),
    )


@jax.jit
def _encode(model: PaliGemma, images: jax.Array) -> jax.Array:
    return model.encode_images(images)


@jax.jit
def _argmax(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


class BigVisionStyle(Ours):
    """The scanned model, called step by step."""

    def generate(self, prompts: Prompts, new_tokens: int) -> Callable[[], np.ndarray]:
        return lambda: self._continue(*self._prefill(prompts, new_tokens), new_tokens)

    def decode(self, prompts: Prompts, new_tokens: int) -> Callable[[], Sample]:

        def call(limit: int) -> Sample:
            first, cache = jax.block_until_ready(self._prefill(prompts, new_tokens))
            watch = Stopwatch()
            self._continue(first, cache, limit)
            return watch.stop()

        call(2)
        return functools.partial(call, new_tokens)

    def _prefill(self, prompts: Prompts, new_tokens: int) -> tuple[jax.Array, KVCache]:
        batch = prompt_batch(prompts)
        length = self.model.config.img.num_patches + prompts[1].shape[1] + new_tokens
        inputs = (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)
        logits, cache = decoding.prefill(self.model, *inputs, slots=length)
        return jnp.argmax(logits, axis=-1), jax.tree.map(_to_bfloat16, cache)

    def _continue(self, first: jax.Array, cache: KVCache, new_tokens: int) -> np.ndarray:
        tokens = [first]
        for _ in range(new_tokens - 1):
            token, cache = _step(self.model, tokens[-1], cache)
            tokens.append(token)
        return np.stack([np.asarray(token) for token in tokens], axis=1).astype(np.int32)


def load_big_vision_style(weights: Path, dtype: Precision) -> BigVisionStyle:
    """Loads a checkpoint with its layers scanned; raises ConfigError unless in float32."""
    if dtype is not Precision.FLOAT32:
        raise ConfigError(f"expected float32, in which big_vision computes, got {dtype}")
    with open_checkpoint(weights) as checkpoint:
        config, params = load_stacked(checkpoint, dtype.value)
    return BigVisionStyle(from_params(config, params, dtype.value))


def _to_bfloat16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


@functools.partial(jax.jit, donate_argnames=("cache",))
def _step(model: PaliGemma, token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    logits, cache = model.extend(token, cache)
    return jnp.argmax(logits, axis=-1), cache


def random_model(config: PaliGemmaConfig, dtype: Precision, seed: int = 0) -> PaliGemma:
    """A model in the layout for inference, for those too large to be written.

    Every float in it is random and not zero. One array is made at a time, in its own dtype, so that
    the weights are all that must fit in memory.
    """
    floats = jnp.dtype(dtype.floats.value)
    model = abstract_unstacked(config, floats, floats)
    if dtype.quantized:
        model = abstract_quantized(model, dtype)
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    filled = [
        jax.block_until_ready(_random(key, leaf.shape, leaf.dtype))
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, filled))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.bits(key, shape, jnp.uint8).view(jnp.int8).astype(dtype)
    deviation = 0.02
    limit = deviation * 3**0.5
    values = jax.random.uniform(key, shape, dtype, -limit, limit)
    return jnp.where(values == 0, jnp.asarray(deviation, dtype), values)


class Compilations:
    """A context that counts the programs JAX compiles within it.

    Those that come from the persistent cache count as well: they were asked for. So do the small
    ones that JAX makes of single operators when arrays are made or converted.

    Attributes:
      counts: by the name of the function.
      seconds: in all.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0
        self._on = False

    def __enter__(self) -> "Compilations":
        self._on = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False

    @property
    def own(self) -> dict[str, int]:
        """The counts without JAX's single operators, and its `stage`, which moves inputs."""
        operators = {*dir(jax.lax), *dir(jnp), "stage"}
        return {name: n for name, n in self.counts.items() if name not in operators}

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if self._on and event == "/jax/core/compile/backend_compile_duration":
            name = str(kwargs.get("fun_name", "?"))
            self.counts[name.removeprefix("jit(").removesuffix(")")] += 1
            self.seconds += duration_secs


def peak_bytes() -> int:
    """Peak memory: of the device, on CPUs of the process."""
    stats = _device_stats()
    return stats["peak_bytes_in_use"] if stats else peak_resident()


def held_bytes() -> int:
    """What is held now."""
    if stats := _device_stats():
        return stats["bytes_in_use"]
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return peak_resident()


def reset_peak() -> None:
    """Restarts `peak_bytes` on CPUs; that of a device cannot be reset."""
    if not _device_stats():
        reset_peak_resident()


def peak_during(call: Callable[[], object]) -> int | None:
    """Peak memory during a call, what was there before included; None where none can tell."""
    stats = _device_stats()
    if not stats:
        if not reset_peak_resident():
            return None
        call()
        return peak_resident()
    # The peak of a device cannot be reset; so its memory is filled up to there first.
    before = stats["bytes_in_use"]
    ballast = jnp.zeros(max(stats["peak_bytes_in_use"] - before, 1), jnp.int8)
    jax.block_until_ready(ballast)
    filled = _device_stats()["bytes_in_use"]
    call()
    above = _device_stats()["peak_bytes_in_use"] - filled
    del ballast
    return before + above


def _device_stats() -> dict[str, int]:
    """Empty where memory is the machine's."""
    device = jax.local_devices()[0]
    return {} if device.platform == "cpu" else device.memory_stats() or {}
