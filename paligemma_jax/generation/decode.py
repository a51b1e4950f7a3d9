"""The compiled functions of generation: one prefill, and a decode loop that stays on the device.

Every value of a `GenerationConfig` is an array with one entry per sequence in these programs, so
sequences with different settings share a batch, and all settings share a program: one for greedy
decoding, one for sampling. Letters: B batch, T prompt tokens, M new tokens at most, V vocabulary,
E ids that end a sequence, K token statistics, P image tokens, W decoder width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.constraints import Constraint
from paligemma_jax.generation.devices import batch_placement
from paligemma_jax.generation.sampling import Greedy, Sampler
from paligemma_jax.generation.token_statistics import TokenStatistics
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.layers import Jitted, on_cpu
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from paligemma_jax.processing.tokenizer import Tokenizer

_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What stays the same from token to token, an entry for each sequence.

    Attributes:
      seeds: u32[B, 2], high and low half; a sequence's samples depend on its own seed only.
      max_new_tokens: i32[B].
      min_new_tokens: i32[B].
      eos_ids: i32[B, E], the ids that end a sequence; -1 for none.
      sampler: how tokens are chosen.
      constraint: which tokens may come next; None allows all.
      token_statistics: what to measure at each step; None measures nothing.
      top_logprobs: number of most probable tokens to note at each step.
    """

    seeds: jax.Array
    max_new_tokens: jax.Array
    min_new_tokens: jax.Array
    eos_ids: jax.Array
    sampler: Sampler | Any
    constraint: Constraint | Any = None
    token_statistics: TokenStatistics | Any = None
    top_logprobs: int = dataclasses.field(default=0, metadata=_STATIC)

    @classmethod
    def greedy(
        cls, sequences: int, max_new_tokens: int, eos_token_id: int | None = Tokenizer.eos_id
    ) -> "DecodePlan":
        """Greedy decoding of `sequences`, all with the same limit; None as id never ends them."""
        end = -1 if eos_token_id is None else eos_token_id
        return cls(
            seeds=jnp.zeros((sequences, 2), jnp.uint32),
            max_new_tokens=jnp.full(sequences, max_new_tokens, jnp.int32),
            min_new_tokens=jnp.zeros(sequences, jnp.int32),
            eos_ids=jnp.full((sequences, 1), end, jnp.int32),
            sampler=Greedy(),
        )

    def allowed(
        self, logits: Float[Array, "B V"], state: Any, step: Int[Array, "*B"]
    ) -> Float[Array, "B V"]:
        """The logits of token number `step`, -inf where constraint or least length forbid it."""
        allowed = logits if self.constraint is None else self.constraint.allow(state, logits)
        early = (step < self.min_new_tokens)[:, None]
        # A mask fuses into what reads the logits; a branch would make a copy of them.
        later = jnp.where(early & self.is_eos(logits.shape[1]), -jnp.inf, allowed)
        if self.constraint is None:
            return later
        some = jnp.any(later > -jnp.inf, axis=1, keepdims=True)
        return jnp.where(some, later, allowed)  # the constraint goes before the least length

    def is_eos(self, vocab_size: int) -> Bool[Array, "B V"]:
        """Which tokens end a sequence."""
        ids = jnp.arange(vocab_size)
        columns = [ids == self.eos_ids[:, i, None] for i in range(self.eos_ids.shape[1])]
        return functools.reduce(jnp.logical_or, columns)

    def ends(self, token: Int[Array, " B"], count: Int[Array, "*B"]) -> Bool[Array, " B"]:
        """Whether a sequence of `count` tokens is over with its last, `token`."""
        return jnp.any(token[:, None] == self.eos_ids, axis=1) | (count >= self.max_new_tokens)

    def keys(self, step: Int[Array, ""]) -> Key[Array, " B"]:
        """Random keys of token number `step`."""

        def key(seed: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), step)

        return jax.vmap(key)(self.seeds)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRecord:
    """What is noted about tokens besides their ids: of one step [B, ...], or of all [B, M, ...].

    Log-probabilities (nats) are those of the model, whatever sampler and constraint did.
    """

    logprob: jax.Array | Any  # f32[B]
    top_ids: jax.Array | Any  # i32[B, top_logprobs]
    top_logprobs: jax.Array | Any  # f32[B, top_logprobs]
    extras: jax.Array | Any  # f32[B, K]

    @classmethod
    def of(cls, plan: DecodePlan, logits: jax.Array, token: jax.Array) -> "TokenRecord":
        """Of a token chosen from the model's logits f32[B, V]."""
        total = jax.nn.logsumexp(logits, axis=1)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        ids = logprobs = extras = None
        if plan.top_logprobs:
            values, ids = jax.lax.top_k(logits, plan.top_logprobs)
            logprobs = values - total[:, None]
        if plan.token_statistics is not None:
            extras = plan.token_statistics.measure(logits, token)
        return cls(chosen - total, ids, logprobs, extras)

    @classmethod
    def empty(cls, plan: DecodePlan, logits: jax.Array, capacity: int) -> "TokenRecord":
        """Room for `capacity` tokens a sequence."""
        batch = logits.shape[0]
        one = jax.eval_shape(lambda x, t: cls.of(plan, x, t), logits, jnp.zeros(batch, jnp.int32))
        return jax.tree.map(lambda x: jnp.zeros((batch, capacity, *x.shape[1:]), x.dtype), one)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeProgress:
    """What changes from token to token, besides the cache.

    Attributes:
      step: i32[], tokens written so far; the same for every sequence.
      token: i32[B], the last one; it is not in the cache yet.
      done: bool[B], the sequence has ended.
      tokens: i32[B, M], 0 after the end and where nothing is written yet.
      record: of each token; 0 where it does not count.
      constraint_state: the constraint's.
    """

    step: jax.Array
    token: jax.Array
    done: jax.Array
    tokens: jax.Array
    record: TokenRecord
    constraint_state: Any = None


@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Decoding between two tokens: made by `start_decoding`, taken on by `continue_decoding`.

    The cache's memory is reused, so a state can be continued once. Its `progress` stays readable
    after that, also while the device already works on the next tokens.
    """

    plan: DecodePlan
    progress: DecodeProgress
    cache: KVCache

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended; waits for the device."""
        return bool(np.all(self.progress.done))

    def end(self, sequences: Bool[np.ndarray, " B"]) -> "DecodeState":
        """Ends the sequences where True; they get no further token."""
        done = self.progress.done | jnp.asarray(sequences)
        return dataclasses.replace(self, progress=dataclasses.replace(self.progress, done=done))


@functools.partial(Jitted, static_argnames=("slots",))
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


@functools.partial(Jitted, static_argnames=("slots",))
def prefill_encoded(
    model: PaliGemma,
    image_tokens: Float[Array, "B P W"],
    tokens: Int[Array, "B T"],
    mask_ar: Int[Array, "B T"],
    mask_input: Bool[Array, "B T"],
    slots: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    """As `prefill`, with images that are encoded already."""
    return model.prefill(image_tokens, tokens, mask_ar, mask_input, slots)


def read_prompts(
    model: PaliGemma, batch: Batch, image_tokens: jax.Array | None = None, *, room: int = 0
) -> tuple[jax.Array, KVCache]:
    """Logits f32[B, V] after each prompt, and a cache with room for `room` tokens more.

    `image_tokens` f[B, P, W] stand in for the images of `batch`, which are then not looked at.
    Raises ConfigError if they are for another number of prompts.
    """
    batch_size, length = batch.tokens.shape
    place = batch_placement(model)
    text = [place(x) for x in (batch.tokens, batch.mask_ar, batch.mask_input)]
    if image_tokens is not None:
        if image_tokens.shape[0] != batch_size:
            raise ConfigError(
                f"expected image tokens for each of {batch_size} sequences, got "
                f"{image_tokens.shape[0]}. Call stack(encoded, batch.tokens.shape[0])"
            )
        slots = cache_length(image_tokens.shape[1] + length + room)
        return prefill_encoded(model, place(image_tokens), *text, slots=slots)
    images = batch.images
    if images is None:
        size = model.config.img.image_size
        images = np.zeros((batch_size, 0, size, size, 3), np.float32)
    slots = cache_length(images.shape[1] * model.config.img.num_patches + length + room)
    return prefill(model, place(images), *text, slots=slots)


def cache_length(tokens: int) -> int:
    """Cache slots for so many tokens: on accelerators a multiple of 256.

    For other sizes XLA on GPUs copies the whole cache into a padded one at every step.
    """
    return tokens if on_cpu() else -(-tokens // 256) * 256


def start_decoding(
    plan: DecodePlan,
    cache: KVCache,
    logits: Float[Array, "B V"],
    sequence_mask: Bool[Array, " B"],
    capacity: int,
) -> DecodeState:
    """Chooses the first token of each sequence of `sequence_mask` from the logits of prefill.

    `capacity`, at least the plan's limits, is the room M for tokens; few different ones compile few
    programs. The cache must have been made with as much room. Nothing waits for the device.
    """
    return DecodeState(plan, start_progress(plan, logits, sequence_mask, capacity), cache)


def continue_decoding(model: PaliGemma, state: DecodeState, steps: int) -> DecodeState:
    """Up to `steps` tokens more for each sequence; fewer if all sequences end before.

    One program whatever `steps` is. Nothing waits for the device: a state that is continued before
    the one before it is read keeps the device busy.
    """
    steps_array = jnp.asarray(steps, jnp.int32)
    progress, cache = decode_steps(model, state.plan, state.progress, state.cache, steps_array)
    return DecodeState(state.plan, progress, cache)


def decode(
    model: PaliGemma,
    plan: DecodePlan,
    cache: KVCache,
    logits: Float[Array, "B V"],
    sequence_mask: Bool[Array, " B"],
    capacity: int,
) -> DecodeState:
    """All tokens of every sequence, without waiting for the device; see `start_decoding`."""
    state = start_decoding(plan, cache, logits, sequence_mask, capacity)
    return continue_decoding(model, state, capacity)


@functools.partial(jax.jit, static_argnames=("capacity",))
def start_progress(
    plan: DecodePlan,
    logits: Float[Array, "B V"],
    sequence_mask: Bool[Array, " B"],
    capacity: int,
) -> DecodeProgress:
    """Progress with the first token of each sequence; see `start_decoding`."""
    batch, constraint = sequence_mask.shape[0], plan.constraint
    nothing = DecodeProgress(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros(batch, jnp.int32),
        done=~sequence_mask,
        tokens=jnp.zeros((batch, capacity), jnp.int32),
        record=TokenRecord.empty(plan, logits, capacity),
        constraint_state=constraint and constraint.start(batch, plan.max_new_tokens),
    )
    return _write(plan, nothing, logits)


@functools.partial(Jitted, donate_argnames=("cache",))
def decode_steps(
    model: PaliGemma,
    plan: DecodePlan,
    progress: DecodeProgress,
    cache: KVCache,
    steps: Int[Array, ""],
) -> tuple[DecodeProgress, KVCache]:
    """The decode loop: up to `steps` tokens more, until every sequence has ended.

    The cache comes back so that its donated memory is reused in place. Without constraint and
    statistics nothing of them is compiled.
    """
    until = progress.step + steps

    def unfinished(carried: tuple[DecodeProgress, KVCache]) -> jax.Array:
        progress, _ = carried
        return (progress.step < until) & ~jnp.all(progress.done)

    def step(carried: tuple[DecodeProgress, KVCache]) -> tuple[DecodeProgress, KVCache]:
        progress, cache = carried
        logits, cache = model.extend(progress.token, cache)
        return _write(plan, progress, logits), cache

    return jax.lax.while_loop(unfinished, step, (progress, cache))


def _write(plan: DecodePlan, progress: DecodeProgress, logits: jax.Array) -> DecodeProgress:
    """Progress with one token more, chosen from the model's logits."""
    step, done, constraint = progress.step, progress.done, plan.constraint
    state = progress.constraint_state
    token = plan.sampler(plan.allowed(logits, state, step), plan.keys(step))
    token = jnp.where(done, 0, token)
    record = TokenRecord.of(plan, logits, token)

    def note(old: jax.Array, new: jax.Array) -> jax.Array:
        ended = done.reshape(-1, *[1] * (new.ndim - 1))
        return old.at[:, step].set(jnp.where(ended, 0, new))

    return DecodeProgress(
        step=step + 1,
        token=token,
        done=done | plan.ends(token, step + 1),
        tokens=progress.tokens.at[:, step].set(token),
        record=jax.tree.map(note, progress.record, record),
        constraint_state=constraint and constraint.advance(state, token),
    )
