"""Decoding the way big_vision does it, as a reference for what that costs.

big_vision itself needs TensorFlow and is not installed beside this library. What it does is short
enough to do here: weights of all layers stacked in one array each and scanned over, float32
activations, a bfloat16 key-value cache, and a Python loop that calls one compiled step a token. The
step's mathematics is this library's own stacked model. big_vision also looks at every token before
it asks for the next; that is left out, in its favour.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.benchmark.implementation import Precision
from paligemma_jax.benchmark.ours import Ours, prompt_batch
from paligemma_jax.benchmark.timing import Sample, Stopwatch
from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.loop import prefill
from paligemma_jax.models.abstract import from_params
from paligemma_jax.models.cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.load import load_from


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
        config, params = load_from(checkpoint, dtype.value)
    return Scanned(from_params(config, params, dtype.value))


def _halved(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


@functools.partial(jax.jit, donate_argnames=("cache",))
def _step(model: PaliGemma, token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    logits, cache = model.extend(token, cache)
    return jnp.argmax(logits, axis=-1), cache
