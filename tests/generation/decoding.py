"""Small models for the tests of generation, and ways to run the decode loop and a constraint."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.generation.constraints import Constraint
from paligemma_jax.generation.decode import DecodePlan, DecodeState, decode, prefill, start_decoding
from paligemma_jax.generation.sampling import Greedy, Sampler
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from paligemma_jax.processing.tokenizer import Tokenizer
from tests.tiny import GEMMA, prompts, random_model, tiny_config

TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "demo" / "tokenizer.model"
CAPACITY = 8
EOS = Tokenizer.eos_id


def plan_of(
    batch: int,
    *,
    sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
    seeds: Sequence[int] | None = None,
    limit: int = CAPACITY,
    eos: int | None = None,
    constraint: Constraint | None = None,
) -> DecodePlan:
    """One for all sequences; None as `eos` never ends them."""
    low = jnp.arange(batch) if seeds is None else jnp.asarray(seeds)
    return dataclasses.replace(
        DecodePlan.greedy(batch, limit, eos),
        seeds=jnp.stack([jnp.zeros_like(low), low], axis=1).astype(jnp.uint32),
        sampler=sampler,
        constraint=constraint,
    )


def read(model: PaliGemma, batch: Batch) -> tuple[jax.Array, KVCache]:
    """Logits and cache after the prompts, with room for CAPACITY tokens."""
    inputs = [jnp.asarray(x) for x in (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)]
    patches = inputs[0].shape[1] * model.config.img.num_patches
    return prefill(model, *inputs, slots=patches + batch.tokens.shape[1] + CAPACITY)


def start(model: PaliGemma, batch: Batch, **settings: Any) -> DecodeState:
    """The state with one token a sequence; `settings` are those of `plan_of`."""
    logits, cache = read(model, batch)
    mask = jnp.ones(len(batch.tokens), bool)
    return start_decoding(plan_of(len(batch.tokens), **settings), cache, logits, mask, CAPACITY)


def decode_all(
    model: PaliGemma, batch: Batch, mask: Sequence[bool] | None = None, **settings: Any
) -> tuple[np.ndarray, np.ndarray, KVCache]:
    """Tokens i32[B, 8], their log-probabilities f32[B, 8], and the cache at the end."""
    size = len(batch.tokens)
    logits, cache = read(model, batch)
    real = jnp.ones(size, bool) if mask is None else jnp.asarray(mask)
    state = decode(model, plan_of(size, **settings), cache, logits, real, CAPACITY)
    progress = state.progress
    return np.asarray(progress.tokens), np.asarray(progress.record.logprob), state.cache


def sequences_of(batch: Batch, indices: Sequence[int]) -> Batch:
    """Some sequences of a batch, in the order given."""
    take = list(indices)
    return Batch(
        images=np.asarray(batch.images)[take],
        tokens=np.asarray(batch.tokens)[take],
        mask_ar=np.asarray(batch.mask_ar)[take],
        mask_input=np.asarray(batch.mask_input)[take],
    )


def padded(batch: Batch, more: int) -> Batch:
    """The batch with `more` padding behind its text."""
    extra = ((0, 0), (0, more))
    return dataclasses.replace(
        batch,
        tokens=np.pad(batch.tokens, extra),
        mask_ar=np.pad(batch.mask_ar, extra, constant_values=1),
        mask_input=np.pad(batch.mask_input, extra),
    )


def programs(*functions: Any) -> int:
    """How many programs jitted functions have compiled."""
    return sum(getattr(f, "_cache_size")() for f in functions)  # noqa: B009


@functools.cache
def tokenizer() -> Tokenizer:
    """The demo's."""
    return Tokenizer.from_file(TOKENIZER)


@functools.cache
def babbler() -> PaliGemma:
    """Random weights over the demo's vocabulary."""
    llm = dataclasses.replace(GEMMA, vocab_size=tokenizer().vocab_size)
    return random_model(tiny_config(llm))


def questions(count: int, seed: int = 0) -> Batch:
    """Random prompts of 4 tokens for `babbler`."""
    return prompts([4] * count, 4, seed=seed)


def speak(
    constraint: Constraint, logits: np.ndarray, *, limit: int, seed: int = 0, noise: float = 0.0
) -> list[int]:
    """One sequence up to EOS or `limit`: the most probable by f32[V] and noise, new each step."""
    arrays = (jnp.asarray(logits), jnp.asarray([limit]), jnp.asarray(seed))
    tokens = np.asarray(_speak(constraint, *arrays, noise))[:limit].tolist()
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
