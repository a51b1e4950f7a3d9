"""This library as an implementation to measure, run as its users run it.

Memory that JAX holds: on the device where there is one, else what is resident.

This library's training step, as `paligemma train` makes it.

Decoding the way big_vision does it, as a reference for what that costs.

big_vision itself needs TensorFlow and is not installed beside this library. What it does is short
enough to do here: weights of all layers stacked in one array each and scanned over, float32
activations, a bfloat16 key-value cache, and a Python loop that calls one compiled step a token. The
step's mathematics is this library's own stacked model. big_vision also looks at every token before
it asks for the next; that is left out, in its favour.

How many programs JAX makes, which ones, and how long that takes.

Models of random weights that are made on the device, for those too large to be written.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from paligemma_jax.benchmark.huggingface import adapter_directory
from paligemma_jax.benchmark.subjects import (
    Precision,
    Sample,
    Stopwatch,
    Task,
    TrainInputs,
    TrainSteps,
    forget_most_resident,
    most_resident,
)
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.decode import DecodePlan, decode, prefill, read_prompts
from paligemma_jax.generation.generate import MIN_CAPACITY, generate
from paligemma_jax.models.inference_layout import abstract_unstacked
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.lora import LoRA
from paligemma_jax.models.paligemma import PaliGemma, from_params, split_model
from paligemma_jax.models.quantization import abstract_quantized
from paligemma_jax.processing.processor import MIN_TEXT_LENGTH, Batch, bucket
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.distributed import place_batch, state_shardings
from paligemma_jax.training.optimizer import AdamW, Constant, Run, make_optimizer
from paligemma_jax.training.step import TrainState, TrainStep, init_state, make_train_step
from paligemma_jax.training.trainer import load_base
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.load import load_stacked, load_unstacked
from paligemma_jax.weights.peft import load_adapter


def peak_bytes() -> int:
    """Most that was held so far."""
    stats = _device_stats()
    return stats["peak_bytes_in_use"] if stats else most_resident()


def held_bytes() -> int:
    """What is held now."""
    stats = _device_stats()
    return stats["bytes_in_use"] if stats else _resident_now()


def forget_peak() -> None:
    """Makes `peak_bytes` begin anew, where memory is the machine's; devices forget nothing."""
    if not _device_stats():
        forget_most_resident()


def peak_during(call: Callable[[], object]) -> int | None:
    """Most that is held during a call, what lives before it included; None where none can tell."""
    if stats := _device_stats():
        return _device_peak(call, stats)
    if not forget_most_resident():
        return None
    call()
    return most_resident()


def _device_peak(call: Callable[[], object], stats: dict[str, int]) -> int:
    """A device never forgets its peak; so memory is filled up to there first."""
    before = stats["bytes_in_use"]
    ballast = jnp.zeros(max(stats["peak_bytes_in_use"] - before, 1), jnp.int8)
    jax.block_until_ready(ballast)
    filled = _device_stats()
    call()
    above = _device_stats()["peak_bytes_in_use"] - filled["bytes_in_use"]
    del ballast
    return before + above


def _device_stats() -> dict[str, int]:
    """Empty where memory is the machine's."""
    device = jax.local_devices()[0]
    return {} if device.platform == "cpu" else device.memory_stats() or {}


def _resident_now() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return most_resident()
    return pages * 4096


ROOM = 64  # tokens of an answer that a cache is made for where none is asked for


class Ours:
    """A model behind `Implementation`, and what only it can be asked."""

    def __init__(self, model: PaliGemma):
        self.model = model

    @property
    def config(self) -> PaliGemmaConfig:
        """The architecture."""
        return self.model.config

    def encode_images(self, images: np.ndarray) -> Callable[[], None]:
        """See `Implementation`."""
        pixels = jnp.asarray(images)

        def call() -> None:
            jax.block_until_ready(_encode(self.model, pixels))

        return call

    def first_token(self, images: np.ndarray, tokens: np.ndarray) -> Callable[[], np.ndarray]:
        """See `Implementation`."""
        batch = prompt_batch(images, tokens)

        def call() -> np.ndarray:
            logits, _ = read_prompts(self.model, batch, room=ROOM)
            return np.asarray(_likeliest(logits))

        return call

    def answer(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> Callable[[], np.ndarray]:
        """See `Implementation`."""
        batch = prompt_batch(images, tokens)

        def call() -> np.ndarray:
            rows = generate(self.model, batch, max_new_tokens=new_tokens, eos_token_id=())
            return np.array([row.tokens for row in rows], np.int32)

        return call

    def logits(self, images: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """See `Implementation`."""
        return np.asarray(read_prompts(self.model, prompt_batch(images, tokens), room=ROOM)[0])

    def answer_text(self, tokens: np.ndarray, *, new_tokens: int) -> None:
        """Answers without a picture, with the prompt filled up as a `Processor` does it."""
        length = tokens.shape[1]
        fill = bucket(length, MIN_TEXT_LENGTH) - length
        real = np.broadcast_to(np.arange(length + fill) < length, (len(tokens), length + fill))
        batch = Batch(
            images=None,
            tokens=np.pad(tokens, ((0, 0), (0, fill))),
            mask_ar=(~real).astype(np.int32),
            mask_input=real,
        )
        generate(self.model, batch, max_new_tokens=new_tokens, eos_token_id=())

    def peak_bytes(self) -> int:
        """See `Implementation`."""
        return peak_bytes()

    def decoding(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> Callable[[], Sample]:
        """See `Implementation`."""
        read, decode = self.reading_and_decoding(images, tokens, new_tokens)
        read()
        decode(2)

        def call() -> Sample:
            read()
            watch = Stopwatch()
            decode(new_tokens)
            return watch.stop()

        return call

    def reading_and_decoding(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> tuple[Callable[[], KVCache], Callable[[int], np.ndarray]]:
        """What reads the prompt, and what decodes up to so many tokens after it; in turn."""
        batch, rows = prompt_batch(images, tokens), len(tokens)
        capacity = bucket(new_tokens, MIN_CAPACITY)
        inputs: list[tuple[jax.Array, KVCache]] = []

        def read() -> KVCache:
            inputs[:] = [jax.block_until_ready(read_prompts(self.model, batch, room=capacity))]
            return inputs[0][1]

        def call(limit: int) -> np.ndarray:
            logits, cache = inputs.pop()
            plan = DecodePlan.greedy(rows, limit, eos_token_id=None)
            state = decode(self.model, plan, cache, logits, jnp.ones(rows, bool), capacity)
            return np.asarray(state.progress.tokens)

        return read, call


def open_ours(weights: Path, dtype: Precision) -> Ours:
    """Loads a checkpoint as `from_pretrained` does, but without a tokenizer."""
    with open_checkpoint(weights) as checkpoint:
        recipe = dtype.value if dtype.quantized else None
        floats = dtype.floats.value
        model = load_unstacked(checkpoint, floats, quantize=recipe)
    return Ours(jax.block_until_ready(model))


def prompt_batch(images: np.ndarray, tokens: np.ndarray) -> Batch:
    """One picture and one prompt without padding a row, on the device."""
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
def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


_RUN = Run(total_steps=100, batch_size=1, data_size=1)  # of no consequence: the rate is constant


class OurTrainer:
    """A state and its step behind `Trainer`."""

    def __init__(self, step: TrainStep, state: TrainState, batch: Batch):
        self._step, self._state, self._batch = step, state, batch
        self._key = jax.random.key(0)

    def step(self) -> float:
        """See `Trainer`."""
        self._state, metrics = self._step(self._state, self._batch, self._key)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def forget_peak(self) -> None:
        """See `Trainer`; a device forgets nothing, and nothing before a step takes as much."""
        forget_peak()

    def peak_bytes(self) -> int:
        """See `Trainer`."""
        return peak_bytes()

    def compiled_bytes(self) -> dict[str, float]:
        """What the program of a step holds, by XLA's own account: what it is given and beside."""
        shapes: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._state)
        found: Any = self._step.lower(shapes, self._batch, self._key).compile().memory_analysis()
        return {
            "given_bytes": found.argument_size_in_bytes,
            "temporary_bytes": found.temp_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes,
        }


def open_our_trainer(weights: Path, dtype: Precision, case: TrainSteps) -> OurTrainer:
    """Loads a checkpoint as training does: masters in float32, all else in `dtype`."""
    lora = LoRA() if case.task is Task.LORA else None
    config = TrainConfig(
        model=str(weights),
        lora=lora,
        learning_rate=case.learning_rate,
        method=AdamW(weight_decay=0.0),
        schedule=Constant(),
        dtype=dtype.value,
        final_logit_softcap=None,
    )
    # One device, as the peer has one, wherever there are more.
    devices = np.array(jax.local_devices()[:1]).reshape(1, 1, 1)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    model = load_base(config, mesh)
    if lora is not None:
        model = load_adapter(model, adapter_directory(weights, model.config))
    inputs = case.inputs(model.config)
    graphdef, arrays = split_model(model)
    del model
    optimizer = make_optimizer(config.optimizer, arrays, _RUN)
    state = init_state(arrays, config.optimizer.trainable(arrays), optimizer)
    del arrays
    shardings = state_shardings(state, mesh)
    state = jax.block_until_ready(jax.device_put(state, shardings))
    step = make_train_step(graphdef, optimizer, config.step_config, shardings=shardings)
    batch = train_batch(inputs)
    placed = place_batch(batch, mesh)
    # The mask stays here and tells the step how much is to learn, as in training.
    batch = dataclasses.replace(placed, mask_loss=batch.mask_loss)
    return OurTrainer(step, state, batch)


def train_batch(inputs: TrainInputs) -> Batch:
    """As `Processor.encode_train` makes it."""
    suffix = inputs.in_suffix.astype(np.int32)
    return Batch(
        images=inputs.images[:, None],
        tokens=inputs.tokens,
        mask_ar=suffix,
        mask_input=np.ones(inputs.tokens.shape, bool),
        mask_loss=suffix,
    )


class Scanned(Ours):
    """The stacked model, called step by step."""

    def answer(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> Callable[[], np.ndarray]:
        """See `Implementation`."""
        return lambda: self._go_on(*self._read(images, tokens, new_tokens), new_tokens)

    def decoding(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> Callable[[], Sample]:
        """See `Implementation`."""

        def call(limit: int) -> Sample:
            first, cache = jax.block_until_ready(self._read(images, tokens, new_tokens))
            watch = Stopwatch()
            self._go_on(first, cache, limit)
            return watch.stop()

        call(2)
        return functools.partial(call, new_tokens)

    def _read(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> tuple[jax.Array, KVCache]:
        batch = prompt_batch(images, tokens)
        length = self.config.img.num_patches + tokens.shape[1] + new_tokens
        inputs = (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)
        logits, cache = prefill(self.model, *inputs, slots=length)
        return jnp.argmax(logits, axis=-1), jax.tree.map(_halved, cache)

    def _go_on(self, first: jax.Array, cache: KVCache, new_tokens: int) -> np.ndarray:
        answer = [first]
        for _ in range(new_tokens - 1):
            token, cache = _step(self.model, answer[-1], cache)
            answer.append(token)
        return np.stack([np.asarray(token) for token in answer], axis=1).astype(np.int32)


def open_scanned(weights: Path, dtype: Precision) -> Scanned:
    """Loads a checkpoint with its layers stacked; raises ConfigError unless in float32."""
    if dtype is not Precision.FLOAT32:
        raise ConfigError(
            f"big_vision's way of decoding is not for {dtype}. It computes in float32. Pass float32"
        )
    with open_checkpoint(weights) as checkpoint:
        config, params = load_stacked(checkpoint, dtype.value)
    return Scanned(from_params(config, params, dtype.value))


def _halved(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


@functools.partial(jax.jit, donate_argnames=("cache",))
def _step(model: PaliGemma, token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    logits, cache = model.extend(token, cache)
    return jnp.argmax(logits, axis=-1), cache


_MADE = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts from when it is made until `stop`.

    A program that comes from the persistent cache counts as well: it was asked for. So do the small
    ones that JAX makes of single operators when arrays are made or converted.

    Attributes:
      counts: by the name of the function.
      seconds: in all.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0
        self._on = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def stop(self) -> "Compilations":
        """Stops counting, and returns itself."""
        self._on = False
        return self

    @property
    def own(self) -> dict[str, int]:
        """The counts without JAX's single operators, and its `stage`, which moves inputs."""
        operators = {*dir(jax.lax), *dir(jnp), "stage"}
        return {name: n for name, n in self.counts.items() if name not in operators}

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if self._on and event == _MADE:
            name = str(kwargs.get("fun_name", "?"))
            self.counts[name.removeprefix("jit(").removesuffix(")")] += 1
            self.seconds += duration_secs


SPREAD = 0.02  # of an initialisation


def random_model(config: PaliGemmaConfig, dtype: Precision, seed: int = 0) -> PaliGemma:
    """A model in the layout for inference; every float in it is random and differs from zero.

    One array is made at a time, in its own dtype, so that the weights are all that must fit.
    """
    name = jnp.dtype(dtype.floats.value)
    model = abstract_unstacked(config, name, name)
    if dtype.quantized:
        model = abstract_quantized(model, dtype)
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    filled = []
    for key, leaf in zip(keys, leaves, strict=True):
        filled.append(jax.block_until_ready(_fill(key, leaf.shape, leaf.dtype)))
    return nnx.merge(graphdef, jax.tree.unflatten(structure, filled))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _fill(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.bits(key, shape, jnp.uint8).view(jnp.int8).astype(dtype)
    width = SPREAD * 3**0.5
    values = jax.random.uniform(key, shape, dtype, -width, width)
    return jnp.where(values == 0, jnp.asarray(SPREAD, dtype), values)
