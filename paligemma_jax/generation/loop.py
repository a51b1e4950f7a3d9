"""The two programs of generation: one prefill, one decode loop that stays on the device.

Letters: B batch, T prompt tokens, M new tokens at most, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from paligemma_jax.generation.sampling import Sampler
from paligemma_jax.models.attention import KVCache
from paligemma_jax.models.paligemma import PaliGemma


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    """What the decode loop carries from token to token."""

    step: jax.Array  # i32[], tokens written so far
    token: jax.Array  # i32[B], the last one
    done: jax.Array  # bool[B], row has ended
    tokens: jax.Array  # i32[B, M]
    logprobs: jax.Array  # f32[B, M]
    cache: KVCache


@functools.partial(jax.jit, static_argnames=("slots",))
def prefill(
    model: PaliGemma,
    images: Float[Array, "B N height width 3"],
    tokens: Int[Array, "B T"],
    mask_ar: Int[Array, "B T"],
    mask_input: Bool[Array, "B T"],
    slots: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Encodes the images, reads the prompts, and returns next-token logits and the filled cache."""
    return model.prefill(model.encode_images(images), tokens, mask_ar, mask_input, slots)


@functools.partial(
    jax.jit, static_argnames=("sampler", "capacity", "eos_id"), donate_argnames=("cache",)
)
def decode(
    model: PaliGemma,
    cache: KVCache,
    logits: Float[Array, "B V"],
    row_mask: Bool[Array, " B"],
    seeds: UInt[Array, " B"],
    limit: Int[Array, ""],
    sampler: Sampler,
    capacity: int,
    eos_id: int,
) -> tuple[Int[Array, "B M"], Float[Array, "B M"], KVCache]:
    """Generates until every row of `row_mask` has ended or `limit` tokens (at most `capacity`).

    Returns tokens (0 after EOS) and the log-probability (nats) of each under the untempered
    distribution. A row's draws depend on its own seed only. The cache comes back so that its
    donated memory is reused in place.
    """
    batch = row_mask.shape[0]

    def choose(logits: jax.Array, step: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
        token = sampler(logits, keys)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        return jnp.where(done, 0, token), jnp.where(done, 0.0, logp)

    def write(progress: _Progress, logits: jax.Array, cache: KVCache) -> _Progress:
        token, logp = choose(logits, progress.step, progress.done)
        return _Progress(
            step=progress.step + 1,
            token=token,
            done=progress.done | (token == eos_id),
            tokens=progress.tokens.at[:, progress.step].set(token),
            logprobs=progress.logprobs.at[:, progress.step].set(logp),
            cache=cache,
        )

    def unfinished(progress: _Progress) -> jax.Array:
        return (progress.step < limit) & ~jnp.all(progress.done)

    def step(progress: _Progress) -> _Progress:
        logits, cache = model.extend(progress.token, progress.cache)
        return write(progress, logits, cache)

    start = _Progress(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros((batch,), jnp.int32),
        done=~row_mask,
        tokens=jnp.zeros((batch, capacity), jnp.int32),
        logprobs=jnp.zeros((batch, capacity), jnp.float32),
        cache=cache,
    )
    end = jax.lax.while_loop(unfinished, step, write(start, logits, cache))
    return end.tokens, end.logprobs, end.cache
