"""The program of prompt lookup: several guessed tokens are read at once, and kept while right.

A pass gives the decoder the last token and D guesses, and finds what greedy decoding would choose
after each of them. Where a guess is the token that was chosen before it, what was chosen after it
is right too. So every pass writes at least one token, and every token written is the one that is
chosen after exactly the tokens before it. Slots of wrong guesses are written over by the next pass.

Letters: B batch, T prompt tokens, D guesses, M new tokens at most, V vocabulary, K numbers noted.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.generation.constraint import Constraint
from paligemma_jax.generation.ngram import guess
from paligemma_jax.generation.observer import Observer
from paligemma_jax.generation.sampling import likeliest, log_probability
from paligemma_jax.models.cache import KVCache
from paligemma_jax.models.jitted import Jitted
from paligemma_jax.models.paligemma import PaliGemma

_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookupPlan:
    """What stays the same from pass to pass.

    Attributes:
      limit: i32[], tokens a row at most.
      eos_id: the token that ends a row.
      guesses: D.
      longest: tokens at most that are looked for; see `guess`.
      kinds: tokens that count as equal there.
      constraint: which tokens may come next; None allows all.
      observer: what to note about each token; None notes nothing.
    """

    limit: jax.Array
    eos_id: int = dataclasses.field(metadata=_STATIC)
    guesses: int = dataclasses.field(metadata=_STATIC)
    longest: int = dataclasses.field(metadata=_STATIC)
    kinds: tuple[tuple[int, int], ...] = dataclasses.field(metadata=_STATIC)
    constraint: Constraint | None = None
    observer: Observer | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookupAnswers:
    """What is written so far; the rows of a batch go on at different paces.

    Attributes:
      count: i32[B], tokens written.
      passes: i32[B], through the decoder, that of the prompt included.
      done: bool[B], the row has ended.
      text: i32[B, T + M], what is looked through: each row's prompt (with what stands before it)
        directly followed by its answer.
      logprobs: f32[B, M], as in the decode loop.
      constraint_state: the constraint's.
      evidence: f32[B, M, K], what the observer noted.
    """

    count: jax.Array
    passes: jax.Array
    done: jax.Array
    text: jax.Array
    logprobs: jax.Array
    constraint_state: Any = None
    evidence: jax.Array | None = None


@functools.partial(Jitted, static_argnames=("capacity",), donate_argnames=("cache",))
def decode_by_lookup(
    model: PaliGemma,
    plan: LookupPlan,
    cache: KVCache,
    logits: Float[Array, "B V"],
    text: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    row_mask: Bool[Array, " B"],
    capacity: int,
) -> tuple[LookupAnswers, KVCache]:
    """Generates until every row of `row_mask` has ended or has `plan.limit` tokens.

    `text` ends with the prompts and is padded behind to T; `lengths` tokens of each row are real.
    `capacity` is the room M for tokens, at least the limit; the cache has room for D more, and a
    length for each row.
    """
    rows, slots = row_mask.shape[0], jnp.arange(cache.valid.shape[1])
    place = jnp.arange(1 + plan.guesses)  # among the tokens of a pass
    last = jnp.max(jnp.where(cache.valid, cache.positions, -1), axis=1)  # of the prompt
    start, prompt = cache.length, cache.valid

    def unfinished(carried: tuple[LookupAnswers, KVCache]) -> jax.Array:
        return ~jnp.all(carried[0].done)

    def step(carried: tuple[LookupAnswers, KVCache]) -> tuple[LookupAnswers, KVCache]:
        answers, cache = carried
        length = lengths + answers.count
        guesses = guess(answers.text, length, plan.guesses, plan.longest, plan.kinds)
        newest = jnp.take_along_axis(answers.text, length[:, None] - 1, axis=1)
        tokens = jnp.concatenate([newest, jnp.maximum(guesses, 0)], axis=1)
        first = start + answers.count - 1  # the newest token is not in the cache yet
        own = first[:, None] + place
        visible = prompt[:, None] | ((slots >= start[:, None, None]) & (slots <= own[:, :, None]))
        positions = (last + answers.count)[:, None] + place
        cache = dataclasses.replace(cache, length=first)
        logits, cache = model.extend_many(tokens, positions, visible, cache)
        return _write(plan, answers, lengths, logits, guesses), cache

    constraint, evidence = plan.constraint, None
    if plan.observer is not None:
        noted = jax.eval_shape(plan.observer.observe, logits, jnp.zeros((rows,), jnp.int32))
        evidence = jnp.zeros((rows, capacity, noted.shape[1]), jnp.float32)
    nothing = LookupAnswers(
        count=jnp.zeros((rows,), jnp.int32),
        passes=jnp.zeros((rows,), jnp.int32),
        done=~row_mask,
        text=jnp.concatenate([text, jnp.zeros((rows, capacity), jnp.int32)], axis=1),
        logprobs=jnp.zeros((rows, capacity), jnp.float32),
        constraint_state=None if constraint is None else constraint.start(rows, plan.limit),
        evidence=evidence,
    )
    none = jnp.zeros((rows, 0), jnp.int32)
    answers = _write(plan, nothing, lengths, logits[:, None], none)
    return jax.lax.while_loop(unfinished, step, (answers, cache))


def _write(
    plan: LookupPlan,
    answers: LookupAnswers,
    lengths: jax.Array,
    logits: jax.Array,
    guesses: jax.Array,
) -> LookupAnswers:
    """Adds the tokens chosen from f32[B, 1 + D, V], as long as the guesses before them are right.

    All that depends on the token before (the constraint, what has ended) is taken one by one.
    """
    never = jnp.full((guesses.shape[0], 1), -1)
    rows = jnp.arange(guesses.shape[0])
    following = jnp.concatenate([guesses, never], axis=1)

    def add(
        carried: tuple[LookupAnswers, jax.Array], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[LookupAnswers, jax.Array], None]:
        answers, right = carried
        logits, guessed = inputs
        state, constraint = answers.constraint_state, plan.constraint
        allowed = logits if constraint is None else constraint.allow(state, logits)
        token = likeliest(allowed)
        logp = log_probability(logits, token)
        place = jnp.where(right, answers.count, answers.logprobs.shape[1])  # nowhere, if wrong
        in_text = jnp.where(right, lengths + answers.count, answers.text.shape[1])
        count = answers.count + right
        done = answers.done | (right & ((token == plan.eos_id) | (count >= plan.limit)))
        if constraint is not None:
            state = _where(right, constraint.advance(state, token), state)
        evidence = answers.evidence
        if plan.observer is not None and evidence is not None:
            noted = plan.observer.observe(logits, token)
            evidence = evidence.at[rows, place].set(noted, mode="drop")
        written = LookupAnswers(
            count=count,
            passes=answers.passes,
            done=done,
            text=answers.text.at[rows, in_text].set(token, mode="drop"),
            logprobs=answers.logprobs.at[rows, place].set(logp, mode="drop"),
            constraint_state=state,
            evidence=evidence,
        )
        return (written, right & ~done & (token == guessed)), None

    active = ~answers.done
    answers = dataclasses.replace(answers, passes=answers.passes + active)
    by_place = (jnp.swapaxes(logits, 0, 1), jnp.swapaxes(following, 0, 1))
    return jax.lax.scan(add, (answers, active), by_place)[0][0]


def _where(chosen: jax.Array, new: Any, old: Any) -> Any:
    """Leaves of `new` for the rows `chosen`, those of `old` for the rest."""

    def of_rows(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(of_rows, new, old)
