"""Beam search, as a loop that stays on the device and moves no keys or values.

The beams of a prompt stand side by side in its one sequence of the cache: each step writes one
token of each beam, and what a beam may attend to is a mask of slots, its ancestry. When beams are
dropped and copied only masks and tokens are. So the prompt is held once, and the cache takes

    B * (prompt + num_beams * M) slots   instead of   B * num_beams * (prompt + M)

of 2 * layers * K * H numbers each: with PaliGemma 3B at 224 pixels in bfloat16 (18 kB a slot),
4 beams and 128 new tokens, 15 MB a prompt instead of 31, of which a step copies nothing.

Letters: B batch, K beams, R sequences returned, M new tokens at most, V vocabulary, S cache slots.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.config import NUM_BEAMS, GenerationConfig, resolve_config
from paligemma_jax.generation.constraints import repeat_constraint
from paligemma_jax.generation.decode import DecodePlan, read_prompts
from paligemma_jax.generation.generate import Request
from paligemma_jax.generation.results import Generation
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from paligemma_jax.processing.tokenizer import Tokenizer

_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamPlan:
    """What stays the same from token to token.

    Attributes:
      decoding: limits and EOS of the B sequences, and a constraint of B * K.
      length_penalty: f32[], a score is logprob / length ** length_penalty.
      num_beams: K, unfinished sequences that are followed at a time.
      num_return_sequences: R, finished sequences that are kept.
      early_stopping: see `GenerationConfig`.
    """

    decoding: DecodePlan
    length_penalty: jax.Array
    num_beams: int = dataclasses.field(metadata=_STATIC)
    num_return_sequences: int = dataclasses.field(metadata=_STATIC)
    early_stopping: bool = dataclasses.field(metadata=_STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Finished:
    """The best finished sequences so far, best first; a score of -inf where there is none."""

    score: jax.Array  # f32[B, R]
    tokens: jax.Array  # i32[B, R, M], 0 behind the end
    logprobs: jax.Array  # f32[B, R, M], of each token
    length: jax.Array  # i32[B, R]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beams:
    """The unfinished sequences; a log-probability of -inf where there is none."""

    logprob: jax.Array  # f32[B, K], of the whole beam
    tokens: jax.Array  # i32[B, K, M]
    logprobs: jax.Array  # f32[B, K, M]
    visible: jax.Array  # bool[B, K, S], slots of the prompt and of the beam itself
    constraint_state: Any  # of B * K sequences


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    step: jax.Array  # i32[], tokens of every beam
    done: jax.Array  # bool[B], no beam can become one of the best any more
    beams: _Beams
    finished: Finished


@functools.partial(Jitted, static_argnames=("capacity",), donate_argnames=("cache",))
def search(
    model: PaliGemma,
    plan: BeamPlan,
    cache: KVCache,
    logits: Float[Array, "B V"],
    sequence_mask: Bool[Array, " B"],
    capacity: int,
) -> tuple[Finished, KVCache]:
    """The best sequences for each prompt of `sequence_mask`, from the logits and cache of prefill.

    `capacity` is the room M for tokens, at least the plan's limits; the cache has room for K * M.
    """
    last = jnp.max(jnp.where(cache.valid, cache.positions, -1), axis=1)
    numbers = jnp.arange(plan.num_beams)

    def unfinished(carried: tuple[_Progress, KVCache]) -> jax.Array:
        return ~jnp.all(carried[0].done)

    def step(carried: tuple[_Progress, KVCache]) -> tuple[_Progress, KVCache]:
        progress, cache = carried
        beams = progress.beams
        slots = jnp.arange(beams.visible.shape[2])
        visible = beams.visible | (slots == cache.length + numbers[:, None])
        token = jax.lax.dynamic_index_in_dim(beams.tokens, progress.step - 1, 2, keepdims=False)
        positions = jnp.broadcast_to((last + progress.step)[:, None], token.shape)
        logits, cache = model.extend_many(token, positions, visible, cache)
        beams = dataclasses.replace(beams, visible=visible)
        return _grow(plan, dataclasses.replace(progress, beams=beams), logits), cache

    shape = (logits.shape[0], plan.num_beams, logits.shape[1])
    first = jnp.broadcast_to(logits[:, None], shape)
    start = _grow(plan, _nothing(plan, cache, sequence_mask, capacity), first)
    end, cache = jax.lax.while_loop(unfinished, step, (start, cache))
    return end.finished, cache


def _nothing(plan: BeamPlan, cache: KVCache, mask: jax.Array, capacity: int) -> _Progress:
    """Before the first token, when all beams are one."""
    batch, beams, kept = mask.shape[0], plan.num_beams, plan.num_return_sequences
    constraint, limit = plan.decoding.constraint, plan.decoding.max_new_tokens
    alone = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    state = constraint and constraint.start(batch * beams, jnp.repeat(limit, beams))
    return _Progress(
        step=jnp.zeros((), jnp.int32),
        done=~mask,
        beams=_Beams(
            logprob=jnp.broadcast_to(alone, (batch, beams)),
            tokens=jnp.zeros((batch, beams, capacity), jnp.int32),
            logprobs=jnp.zeros((batch, beams, capacity), jnp.float32),
            visible=jnp.repeat(cache.valid[:, None], beams, axis=1),
            constraint_state=state,
        ),
        finished=Finished(
            score=jnp.full((batch, kept), -jnp.inf),
            tokens=jnp.zeros((batch, kept, capacity), jnp.int32),
            logprobs=jnp.zeros((batch, kept, capacity), jnp.float32),
            length=jnp.zeros((batch, kept), jnp.int32),
        ),
    )


def _grow(plan: BeamPlan, progress: _Progress, logits: jax.Array) -> _Progress:
    """One token more, chosen from f32[B, K, V]; and sequences that end with it."""
    beams, width, step, done = progress.beams, plan.num_beams, progress.step, progress.done
    batch, _, vocab_size = logits.shape
    logprobs = _allowed_logprobs(plan, beams, logits, step)
    whole = beams.logprob[:, :, None] + logprobs
    eos_ids = plan.decoding.eos_ids[:, None]  # [B, 1, E]
    of_eos = jnp.take_along_axis(logprobs, jnp.maximum(eos_ids, 0), axis=2)
    of_eos = jnp.where(eos_ids >= 0, of_eos, -jnp.inf)
    eos_logprob = jnp.max(of_eos, axis=2)
    best_eos = jnp.broadcast_to(eos_ids, of_eos.shape)
    best_eos = jnp.take_along_axis(best_eos, jnp.argmax(of_eos, axis=2)[:, :, None], axis=2)
    ends = beams.logprob + eos_logprob
    # The best of all are among the best of each beam; sorting these few is far cheaper.
    going_on = jnp.where(plan.decoding.is_eos(vocab_size)[:, None], -jnp.inf, whole)
    of_beam, tokens = jax.lax.top_k(going_on, width)
    candidates = of_beam.reshape(batch, -1)
    if not plan.early_stopping:
        better = jnp.concatenate([candidates, ends], axis=1)[:, None] > ends[:, :, None]
        ends = jnp.where(jnp.sum(better, axis=2) < width, ends, -jnp.inf)
    ended_tokens = beams.tokens.at[:, :, step].set(best_eos[:, :, 0])
    ended_logprobs = beams.logprobs.at[:, :, step].set(eos_logprob)
    ends = jnp.where(done[:, None], -jnp.inf, ends)
    finished = _keep(plan, progress.finished, ends, ended_tokens, ended_logprobs, step + 1)

    logprob, place = jax.lax.top_k(candidates, width)
    parent = place // width
    token = jnp.take_along_axis(tokens.reshape(candidates.shape), place, axis=1)
    chosen = jnp.take_along_axis(logprobs.reshape(batch, -1), parent * vocab_size + token, axis=1)
    grown = _Beams(
        logprob=logprob,
        tokens=_take(beams.tokens, parent).at[:, :, step].set(token),
        logprobs=_take(beams.logprobs, parent).at[:, :, step].set(chosen),
        visible=_take(beams.visible, parent),
        constraint_state=_advance(plan, beams.constraint_state, parent, token),
    )
    done = done | _is_settled(plan, grown, finished, step)
    at_limit = ~done & (step + 1 >= plan.decoding.max_new_tokens)
    if not plan.early_stopping:  # what is cut counts as it is
        cut = jnp.where(at_limit[:, None], grown.logprob, -jnp.inf)
        finished = _keep(plan, finished, cut, grown.tokens, grown.logprobs, step + 1)
    return _Progress(step + 1, done | at_limit, grown, finished)


def _allowed_logprobs(
    plan: BeamPlan, beams: _Beams, logits: jax.Array, step: jax.Array
) -> jax.Array:
    """The model's log-probabilities f32[B, K, V], -inf where a token may not come next."""
    repeated = dataclasses.replace(
        plan.decoding,
        eos_ids=jnp.repeat(plan.decoding.eos_ids, plan.num_beams, axis=0),
        min_new_tokens=jnp.repeat(plan.decoding.min_new_tokens, plan.num_beams),
    )
    flat = logits.reshape(-1, logits.shape[2])
    allowed = repeated.allowed(flat, beams.constraint_state, step) > -jnp.inf
    return jnp.where(allowed.reshape(logits.shape), jax.nn.log_softmax(logits), -jnp.inf)


def _advance(plan: BeamPlan, state: Any, parent: jax.Array, token: jax.Array) -> Any:
    if plan.decoding.constraint is None:
        return None

    def follow(leaf: jax.Array) -> jax.Array:
        return _take(leaf.reshape(*parent.shape, *leaf.shape[1:]), parent).reshape(leaf.shape)

    return plan.decoding.constraint.advance(jax.tree.map(follow, state), token.reshape(-1))


def _keep(
    plan: BeamPlan,
    finished: Finished,
    logprob: jax.Array,
    tokens: jax.Array,
    logprobs: jax.Array,
    length: jax.Array,
) -> Finished:
    """The best R of the finished sequences and of K more, f32[B, K] and [B, K, M]."""
    score = jnp.concatenate([finished.score, logprob / length**plan.length_penalty], axis=1)
    score, place = jax.lax.top_k(score, plan.num_return_sequences)
    new = jnp.broadcast_to(length, logprob.shape)
    return Finished(
        score=score,
        tokens=_take(jnp.concatenate([finished.tokens, tokens], axis=1), place),
        logprobs=_take(jnp.concatenate([finished.logprobs, logprobs], axis=1), place),
        length=_take(jnp.concatenate([finished.length, new], axis=1), place),
    )


def _is_settled(plan: BeamPlan, beams: _Beams, finished: Finished, step: jax.Array) -> jax.Array:
    """Exact: log-probabilities only fall, and the score is monotone in the length."""
    power = plan.length_penalty
    soonest = beams.logprob / (step + 2) ** power
    latest = beams.logprob / (plan.decoding.max_new_tokens**power)[:, None]
    return finished.score[:, -1] >= jnp.max(jnp.maximum(soonest, latest), axis=1)


def _take(array: jax.Array, place: jax.Array) -> jax.Array:
    """array[b, place[b, i]] for every sequence b."""
    return array[jnp.arange(place.shape[0])[:, None], place]


def beam_search(
    model: PaliGemma,
    batch: Batch,
    tokenizer: Tokenizer | None = None,
    *,
    config: GenerationConfig | None = None,
    image_tokens: jax.Array | None = None,
    **settings: Any,
) -> list[list[Generation]]:
    """The most probable sequences that a search of limited width finds, the highest score first.

    The `num_beams` most probable unfinished sequences are followed token by token. The search ends
    when none of them can become one of the best any more, or at `max_new_tokens`.

    Args:
      model, batch, tokenizer, config, image_tokens, **settings: as for `generate`. Of the
        configuration it uses the limits, `eos_token_id`, `constraint`, `num_beams` (more find more
        probable sequences and cost more), `length_penalty`, `early_stopping` and
        `num_return_sequences`.

    Returns:
      For each prompt `num_return_sequences`, if as many are found; none where no sequence satisfies
      the constraint and ends.

    Raises:
      ConfigError: for more beams than tokens to choose from, and as `generate` does.
    """
    config = resolve_config("beam_search", config, settings)
    num_beams, vocab_size = config.num_beams or NUM_BEAMS, model.config.llm.vocab_size
    if num_beams >= vocab_size:
        raise ConfigError(
            f"num_beams: expected less than the {vocab_size:,} tokens there are, got {num_beams:,}."
        )
    plain = GenerationConfig(  # what has no meaning in a search is left out
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        eos_token_id=config.eos_token_id,
        constraint=config.constraint,
    )
    request = Request.of(model, batch, tokenizer, plain, image_tokens)
    constraint = repeat_constraint(request.plan.constraint, num_beams)
    plan = BeamPlan(
        decoding=dataclasses.replace(request.plan, constraint=constraint),
        length_penalty=jnp.asarray(config.length_penalty, jnp.float32),
        num_beams=num_beams,
        num_return_sequences=config.num_return_sequences,
        early_stopping=config.early_stopping,
    )
    capacity, mask = request.capacity, jnp.asarray(request.sequence_mask)
    logits, cache = read_prompts(model, batch, image_tokens, room=num_beams * capacity)
    finished, _ = search(model, plan, cache, logits, mask, capacity)
    every = (finished.tokens, finished.logprobs, finished.length, finished.score)
    tokens, logprobs, lengths, scores = map(np.asarray, every)
    return [
        [
            request.generation(
                number,
                tokens[i, r, :length],
                {"logprob": logprobs[i, r]},
                score=float(scores[i, r]),
            )
            for r, length in enumerate(lengths[i])
            if scores[i, r] > -np.inf
        ]
        for number, i in enumerate(request.indices)
    ]
