"""A model that knows the demo's words, and a way to run a constraint without any model."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.generation.constraints import Constraint
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from paligemma_jax.processing.tokenizer import Tokenizer
from tests.tiny import GEMMA, prompts, random_model, tiny_config

TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "demo" / "tokenizer.model"
EOS = Tokenizer.eos_id


@functools.cache
def tokenizer() -> Tokenizer:
    """The demo's."""
    return Tokenizer.from_file(TOKENIZER)


@functools.cache
def babbler() -> PaliGemma:
    """Random weights over the demo's vocabulary."""
    llm = dataclasses.replace(GEMMA, vocab_size=tokenizer().vocab_size)
    return random_model(tiny_config(llm))


def questions(rows: int, seed: int = 0) -> Batch:
    """Random prompts of 4 tokens for `babbler`."""
    return prompts([4] * rows, 4, seed=seed)


def speak(
    constraint: Constraint, logits: np.ndarray, *, limit: int, seed: int = 0, noise: float = 0.0
) -> list[int]:
    """One row's tokens up to EOS or `limit`: the likeliest by f32[V] and noise, new each step."""
    tokens = _speak(constraint, jnp.asarray(logits), jnp.asarray(limit), jnp.asarray(seed), noise)
    tokens = np.asarray(tokens)[:limit].tolist()
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


@jax.jit
def _speak(
    constraint: Constraint, logits: jax.Array, limit: jax.Array, seed: jax.Array, noise: float
) -> jax.Array:
    def step(state, key: jax.Array):
        noisy = logits + noise * jax.random.normal(key, logits.shape)
        token = jnp.argmax(constraint.allow(state, noisy[None]), axis=1).astype(jnp.int32)
        return constraint.advance(state, token), token[0]

    keys = jax.random.split(jax.random.key(seed), 128)
    return jax.lax.scan(step, constraint.start(1, limit), keys)[1]
