"""The two programs of generation: one prefill, one decode loop that stays on the device.

Letters: B batch, T prompt tokens, M new tokens at most, V vocabulary, K numbers observed a step.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from paligemma_jax.generation.constraint import Constraint
from paligemma_jax.generation.observer import Observer
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
    state: Any = None  # the constraint's
    evidence: jax.Array | None = None  # f32[B, M, K]


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
    constraint: Constraint | None = None,
    observer: Observer | None = None,
) -> tuple[Int[Array, "B M"], Float[Array, "B M"], KVCache, Float[Array, "B M K"] | None]:
    """Generates until every row of `row_mask` has ended or `limit` tokens (at most `capacity`).

    Returns tokens (0 after EOS), the log-probability (nats) of each under the untempered and
    unconstrained distribution, and what `observer` noted (0 after EOS). A row's draws depend on its
    own seed only. The cache comes back so that its donated memory is reused in place. Without
    constraint and observer nothing of them is compiled.
    """
    batch = row_mask.shape[0]

    def choose(
        logits: jax.Array, state: Any, step: jax.Array, done: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
        token = sampler(logits if constraint is None else constraint.allow(state, logits), keys)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        return jnp.where(done, 0, token), jnp.where(done, 0.0, logp)

    def note(progress: _Progress, logits: jax.Array, token: jax.Array) -> jax.Array | None:
        if observer is None or progress.evidence is None:
            return None
        seen = jnp.where(progress.done[:, None], 0.0, observer.observe(logits, token))
        return progress.evidence.at[:, progress.step].set(seen)

    def write(progress: _Progress, logits: jax.Array, cache: KVCache) -> _Progress:
        token, logp = choose(logits, progress.state, progress.step, progress.done)
        return _Progress(
            step=progress.step + 1,
            token=token,
            done=progress.done | (token == eos_id),
            tokens=progress.tokens.at[:, progress.step].set(token),
            logprobs=progress.logprobs.at[:, progress.step].set(logp),
            cache=cache,
            state=None if constraint is None else constraint.advance(progress.state, token),
            evidence=note(progress, logits, token),
        )

    def room() -> jax.Array | None:
        if observer is None:
            return None
        some = jax.eval_shape(observer.observe, logits, jnp.zeros((batch,), jnp.int32))
        return jnp.zeros((batch, capacity, some.shape[1]), jnp.float32)

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
        state=None if constraint is None else constraint.start(batch, limit),
        evidence=room(),
    )
    end = jax.lax.while_loop(unfinished, step, write(start, logits, cache))
    return end.tokens, end.logprobs, end.cache, end.evidence
