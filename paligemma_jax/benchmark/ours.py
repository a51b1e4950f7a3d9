"""This library as an implementation to measure, run as its users run it."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.benchmark.implementation import Precision
from paligemma_jax.benchmark.memory import peak_bytes
from paligemma_jax.benchmark.timing import Sample, Stopwatch
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.generation.generate import MIN_CAPACITY, generate
from paligemma_jax.generation.loop import decode
from paligemma_jax.generation.prefix import read_prefix
from paligemma_jax.generation.sampling import Greedy
from paligemma_jax.models.cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.batch import Batch
from paligemma_jax.processing.buckets import MIN_TEXT_LENGTH, bucket
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.load_unrolled import load_unrolled

NEVER = -1  # no token ends an answer
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
            logits, _ = read_prefix(self.model, batch, room=ROOM)
            return np.asarray(_likeliest(logits))

        return call

    def answer(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> Callable[[], np.ndarray]:
        """See `Implementation`."""
        batch = prompt_batch(images, tokens)

        def call() -> np.ndarray:
            rows = generate(self.model, batch, max_new_tokens=new_tokens, eos_id=NEVER)
            return np.array([row.tokens for row in rows], np.int32)

        return call

    def logits(self, images: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """See `Implementation`."""
        return np.asarray(read_prefix(self.model, prompt_batch(images, tokens), room=ROOM)[0])

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
        generate(self.model, batch, max_new_tokens=new_tokens, eos_id=NEVER)

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
            inputs[:] = [jax.block_until_ready(read_prefix(self.model, batch, room=capacity))]
            return inputs[0][1]

        def call(limit: int) -> np.ndarray:
            logits, cache = inputs.pop()
            answers = decode(
                self.model,
                cache,
                logits,
                jnp.ones(rows, bool),
                jnp.zeros(rows, jnp.uint32),
                jnp.asarray(limit, jnp.int32),
                sampler=Greedy(),
                capacity=capacity,
                eos_id=NEVER,
            )
            return np.asarray(answers[0])

        return read, call


def open_ours(weights: Path, dtype: Precision) -> Ours:
    """Loads a checkpoint as `from_pretrained` does, but without a tokenizer."""
    with open_checkpoint(weights) as checkpoint:
        recipe = dtype.value if dtype.quantized else None
        floats = dtype.floats.value
        model = load_unrolled(checkpoint, checkpoint.config, floats, recipe=recipe)
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
