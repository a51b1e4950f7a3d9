"""The program of beam search: a loop that stays on the device and moves no keys or values.

The beams of a row stand side by side in the one cache of that row: each step writes one token of
each beam, and what a beam may look at is a mask of slots, its ancestry. When beams are dropped and
doubled only masks and tokens are copied. So the prompt is held once, and the cache takes

    B * (prompt + beams * M) slots   instead of   B * beams * (prompt + M)

of 2 * layers * K * H numbers each: with PaliGemma 3B at 224 pixels in bfloat16 (18 kB a slot),
4 beams and 128 new tokens, 15 MB a row instead of 31, of which a step copies nothing.

Letters: B batch, K beams, A answers kept, M new tokens at most, V vocabulary, S cache slots.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from paligemma_jax.generation.constraint import Constraint
from paligemma_jax.models.cache import KVCache
from paligemma_jax.models.jitted import Jitted
from paligemma_jax.models.paligemma import PaliGemma

_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamPlan:
    """What stays the same from token to token.

    Attributes:
      limit: i32[], tokens an answer at most, its end included.
      alpha: f32[], an answer's score is its log-probability / length ** alpha.
      eos_id: the token that ends an answer.
      beams: K, beginnings of answers that are followed at a time.
      answers: A, ended answers that are kept.
      anytime: see `beam_search`.
      constraint: for B * K rows; None allows all tokens.
    """

    limit: jax.Array
    alpha: jax.Array
    eos_id: int = dataclasses.field(metadata=_STATIC)
    beams: int = dataclasses.field(metadata=_STATIC)
    answers: int = dataclasses.field(metadata=_STATIC)
    anytime: bool = dataclasses.field(metadata=_STATIC)
    constraint: Constraint | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ended:
    """The best answers so far, best first; a score of -inf where there is none."""

    score: jax.Array  # f32[B, A]
    logprob: jax.Array  # f32[B, A], of the whole answer
    tokens: jax.Array  # i32[B, A, M], 0 behind the end
    length: jax.Array  # i32[B, A]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Live:
    """The beginnings that are followed; a log-probability of -inf where there is none."""

    logprob: jax.Array  # f32[B, K]
    tokens: jax.Array  # i32[B, K, M]
    seen: jax.Array  # bool[B, K, S], slots of the prompt and of the beginning itself
    constraint_state: Any  # of B * K rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    step: jax.Array  # i32[], tokens of every beginning
    done: jax.Array  # bool[B], no beginning can become one of the best answers any more
    live: _Live
    ended: Ended


@functools.partial(Jitted, static_argnames=("capacity",), donate_argnames=("cache",))
def search(
    model: PaliGemma,
    plan: BeamPlan,
    cache: KVCache,
    logits: Float[Array, "B V"],
    row_mask: Bool[Array, " B"],
    capacity: int,
) -> tuple[Ended, KVCache]:
    """The best answers to each row of `row_mask`, from the logits and cache of prefill.

    `capacity` is the room M for tokens, at least `plan.limit`; the cache has room for K * M.
    """
    last = jnp.max(jnp.where(cache.valid, cache.positions, -1), axis=1)
    beams = jnp.arange(plan.beams)

    def unfinished(carried: tuple[_Progress, KVCache]) -> jax.Array:
        progress, _ = carried
        return (progress.step < plan.limit) & ~jnp.all(progress.done)

    def step(carried: tuple[_Progress, KVCache]) -> tuple[_Progress, KVCache]:
        progress, cache = carried
        live = progress.live
        slots = jnp.arange(live.seen.shape[2])
        seen = live.seen | (slots == cache.length + beams[:, None])
        token = jax.lax.dynamic_index_in_dim(live.tokens, progress.step - 1, 2, keepdims=False)
        positions = jnp.broadcast_to((last + progress.step)[:, None], token.shape)
        logits, cache = model.extend_many(token, positions, seen, cache)
        live = dataclasses.replace(live, seen=seen)
        return _grow(plan, dataclasses.replace(progress, live=live), logits), cache

    rows = (logits.shape[0], plan.beams)
    first = jnp.broadcast_to(logits[:, None], (*rows, logits.shape[1]))
    start = _grow(plan, _nothing(plan, cache, row_mask, capacity), first)
    end, cache = jax.lax.while_loop(unfinished, step, (start, cache))
    if plan.anytime:
        return end.ended, cache
    whole = jnp.where(end.done[:, None], -jnp.inf, end.live.logprob)  # cut at the limit
    return _keep(plan, end.ended, whole, end.live.tokens, plan.limit), cache


def _nothing(plan: BeamPlan, cache: KVCache, row_mask: jax.Array, capacity: int) -> _Progress:
    """Before the first token, when all beams are one."""
    batch, beams, answers = row_mask.shape[0], plan.beams, plan.answers
    constraint = plan.constraint
    none = jnp.full((batch, answers), -jnp.inf)
    alone = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    return _Progress(
        step=jnp.zeros((), jnp.int32),
        done=~row_mask,
        live=_Live(
            logprob=jnp.broadcast_to(alone, (batch, beams)),
            tokens=jnp.zeros((batch, beams, capacity), jnp.int32),
            seen=jnp.repeat(cache.valid[:, None], beams, axis=1),
            constraint_state=constraint and constraint.start(batch * beams, plan.limit),
        ),
        ended=Ended(
            score=none,
            logprob=none,
            tokens=jnp.zeros((batch, answers, capacity), jnp.int32),
            length=jnp.zeros((batch, answers), jnp.int32),
        ),
    )


def _grow(plan: BeamPlan, progress: _Progress, logits: jax.Array) -> _Progress:
    """One token more, chosen from f32[B, K, V]; and answers that end with it."""
    live, beams, step = progress.live, plan.beams, progress.step
    whole = live.logprob[:, :, None] + _allowed_logprobs(plan, live, logits)
    is_eos = jnp.arange(logits.shape[2]) == plan.eos_id
    ends = jnp.max(jnp.where(is_eos, whole, -jnp.inf), axis=2)
    # The best of all are among the best of each beam; sorting these few is far cheaper.
    of_beam, tokens = jax.lax.top_k(jnp.where(is_eos, -jnp.inf, whole), beams)
    candidates = of_beam.reshape(ends.shape[0], -1)
    if not plan.anytime:
        better = jnp.concatenate([candidates, ends], axis=1)[:, None] > ends[:, :, None]
        ends = jnp.where(jnp.sum(better, axis=2) < beams, ends, -jnp.inf)
    ends = jnp.where(progress.done[:, None], -jnp.inf, ends)
    ending = live.tokens.at[:, :, step].set(plan.eos_id)
    ended = _keep(plan, progress.ended, ends, ending, step + 1)

    logprob, place = jax.lax.top_k(candidates, beams)
    parent = place // beams
    token = jnp.take_along_axis(tokens.reshape(candidates.shape), place, axis=1)
    grown = _Live(
        logprob=logprob,
        tokens=_rows_of(live.tokens, parent).at[:, :, step].set(token),
        seen=_rows_of(live.seen, parent),
        constraint_state=_advance(plan, live.constraint_state, parent, token),
    )
    return _Progress(step + 1, _is_done(plan, progress.done, grown, ended, step), grown, ended)


def _allowed_logprobs(plan: BeamPlan, live: _Live, logits: jax.Array) -> jax.Array:
    """The model's log-probabilities f32[B, K, V], -inf where a token may not come next."""
    logprobs = jax.nn.log_softmax(logits)
    if plan.constraint is None:
        return logprobs
    flat = logits.reshape(-1, logits.shape[2])
    allowed = plan.constraint.allow(live.constraint_state, flat) > -jnp.inf
    return jnp.where(allowed.reshape(logits.shape), logprobs, -jnp.inf)


def _advance(plan: BeamPlan, state: Any, parent: jax.Array, token: jax.Array) -> Any:
    if plan.constraint is None:
        return None

    def follow(leaf: jax.Array) -> jax.Array:
        return _rows_of(leaf.reshape(*parent.shape, *leaf.shape[1:]), parent).reshape(leaf.shape)

    return plan.constraint.advance(jax.tree.map(follow, state), token.reshape(-1))


def _keep(
    plan: BeamPlan, ended: Ended, logprob: jax.Array, tokens: jax.Array, length: jax.Array
) -> Ended:
    """The best A of the answers there are and of K more, f32[B, K] and i32[B, K, M]."""
    score = jnp.concatenate([ended.score, logprob / length**plan.alpha], axis=1)
    score, place = jax.lax.top_k(score, plan.answers)
    new = jnp.broadcast_to(length, logprob.shape)
    return Ended(
        score=score,
        logprob=_rows_of(jnp.concatenate([ended.logprob, logprob], axis=1), place),
        tokens=_rows_of(jnp.concatenate([ended.tokens, tokens], axis=1), place),
        length=_rows_of(jnp.concatenate([ended.length, new], axis=1), place),
    )


def _is_done(
    plan: BeamPlan, done: jax.Array, live: _Live, ended: Ended, step: jax.Array
) -> jax.Array:
    """Exact: log-probabilities only fall, and the score is monotone in the length."""
    soonest = live.logprob / (step + 2) ** plan.alpha
    latest = live.logprob / plan.limit**plan.alpha
    return done | (ended.score[:, -1] >= jnp.max(jnp.maximum(soonest, latest), axis=1))


def _rows_of(array: jax.Array, place: jax.Array) -> jax.Array:
    """array[b, place[b, i]] for every row b."""
    return array[jnp.arange(place.shape[0])[:, None], place]
