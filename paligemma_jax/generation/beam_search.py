"""The program of beam search: a loop that stays on the device and moves no keys or values.

The beams of a row stand side by side in the one cache of that row: each step writes one token of
each beam, and what a beam may look at is a mask of slots, its ancestry. When beams are dropped and
doubled only masks and tokens are copied. So the prompt is held once, and the cache takes

    B * (prompt + beams * M) slots   instead of   B * beams * (prompt + M)

of 2 * layers * K * H numbers each: with PaliGemma 3B at 224 pixels in bfloat16 (18 kB a slot),
4 beams and 128 new tokens, 15 MB a row instead of 31, of which a step copies nothing.

Letters: B batch, K beams, A answers kept, M new tokens at most, V vocabulary, S cache slots.

When the answers of a beam search end: small frozen dataclasses, one rule each.

Beam search: the answers of highest probability that a search of limited width finds.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.constraints import Constraint, PerRow, for_batch
from paligemma_jax.generation.decode import MIN_CAPACITY, read_prefix, real_rows
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch, bucket

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


@dataclasses.dataclass(frozen=True)
class EndAnytime:
    """big_vision's rule: every beginning might end at each step, however unlikely that is.

    Only answers that end count.
    """


@dataclasses.dataclass(frozen=True)
class EndWhenRanked:
    """Hugging Face's rule: an answer may end where EOS is among the likeliest continuations.

    As many are looked at as beginnings are followed. What has not ended when it is cut counts as it
    is. With one beam and no normalization by length this is `Greedy`.
    """


Ending: TypeAlias = EndAnytime | EndWhenRanked


@dataclasses.dataclass(frozen=True)
class BeamAnswer:
    """One answer that beam search found.

    Attributes:
      tokens: up to and including EOS; without EOS where it was cut.
      logprob: log-probability (nats) of the whole answer.
      score: `logprob / len(tokens) ** alpha`, by which answers are ranked.
    """

    tokens: tuple[int, ...]
    logprob: float
    score: float


def beam_search(
    model: PaliGemma,
    batch: Batch,
    *,
    beams: int = 4,
    max_new_tokens: int = 128,
    alpha: float = 0.0,
    answers: int = 1,
    ending: Ending = EndAnytime(),  # noqa: B008 (frozen)
    eos_id: int = 1,
    constraint: Constraint | Sequence[Constraint] | None = None,
    image_tokens: jax.Array | None = None,
) -> list[list[BeamAnswer]]:
    """The best answers to each real row of `batch`, best first.

    The `beams` likeliest beginnings are followed token by token. A row is searched until no
    beginning can lead to one of the best answers any more, or `max_new_tokens` are reached.

    Args:
      model: the model.
      batch: the prompts.
      beams: how many beginnings are followed; more find likelier answers and cost more.
      max_new_tokens: of an answer, its end included.
      alpha: 0 ranks by probability, which favours short answers; 1 by the mean log-probability of
        a token; as Hugging Face's `length_penalty`.
      answers: how many are returned for each row, if as many are found.
      ending: when an answer ends, and whether one that is cut counts.
      eos_id: the token that ends an answer.
      constraint: what may be answered; one for all, or one a row. Log-probabilities stay the
        model's.
      image_tokens: the pictures of a batch without any, encoded before (see `prepare`).

    Returns:
      A list for each row; an empty one where no answer keeps the constraint and ends.

    Raises:
      ConfigError: for less than one beam, answer or token, for more beams than tokens to choose
        from, and for constraints that no answer could keep.
    """
    vocab_size = model.config.llm.vocab_size
    _check(beams, max_new_tokens, answers, ending, vocab_size)
    row_mask = real_rows(batch)
    if constraint is not None:
        constraint = for_batch(constraint, row_mask, vocab_size, max_new_tokens)
        if isinstance(constraint, PerRow):
            repeat = lambda leaf: jnp.repeat(leaf, beams, axis=0)  # noqa: E731
            constraint = PerRow(jax.tree.map(repeat, constraint.rows))
    capacity = bucket(max_new_tokens, MIN_CAPACITY)
    logits, cache = read_prefix(model, batch, image_tokens, room=beams * capacity)
    plan = BeamPlan(
        limit=jnp.asarray(max_new_tokens, jnp.int32),
        alpha=jnp.asarray(alpha, jnp.float32),
        eos_id=eos_id,
        beams=beams,
        answers=answers,
        anytime=isinstance(ending, EndAnytime),
        constraint=constraint,
    )
    ended, _ = search(model, plan, cache, logits, jnp.asarray(row_mask), capacity)
    every = [np.asarray(x) for x in (ended.tokens, ended.length, ended.logprob, ended.score)]
    return [
        [
            BeamAnswer(tuple(tokens[:length].tolist()), float(logprob), float(score))
            for tokens, length, logprob, score in zip(*(x[row] for x in every), strict=True)
            if score > -np.inf
        ]
        for row in np.flatnonzero(row_mask)
    ]


def _check(beams: int, max_new_tokens: int, answers: int, ending: object, vocab_size: int) -> None:
    wrong = [
        f"{name} is {value}"
        for name, value in [
            ("beams", beams),
            ("max_new_tokens", max_new_tokens),
            ("answers", answers),
        ]
        if value < 1
    ]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}; nothing can be searched. It must be at least 1. "
            "Leave it out for the default."
        )
    if beams >= vocab_size:
        raise ConfigError(
            f"{beams:,} beams do not fit a vocabulary of {vocab_size:,}. Fewer than it has tokens "
            "fit. Call beam_search(model, batch, beams=4)"
        )
    if not isinstance(ending, EndAnytime | EndWhenRanked):
        raise ConfigError(
            f"ending is {ending!r}, which is no rule for the end of answers. EndAnytime() and "
            "EndWhenRanked() fit. Leave it out for EndAnytime()."
        )
