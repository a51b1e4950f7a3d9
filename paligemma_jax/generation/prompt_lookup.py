"""The program of prompt lookup: several guessed tokens are read at once, and kept while right.

A pass gives the decoder the last token and D guesses, and finds what greedy decoding would choose
after each of them. Where a guess is the token that was chosen before it, what was chosen after it
is right too. So every pass writes at least one token, and every token written is the one that is
chosen after exactly the tokens before it. Slots of wrong guesses are written over by the next pass.

Letters: B batch, T prompt tokens, D guesses, M new tokens at most, V vocabulary, K numbers noted.

Guesses of what comes next in a text: what came after its last words when they stood before.

Letters: B batch, W tokens of the text at most, D tokens guessed, N tokens compared.

Greedy decoding in fewer passes: guesses looked up in prompt and answer, checked several at once.

Answers of PaliGemma repeat: labels and separators between boxes, words of the prompt, lines of a
table. Prompt lookup (arXiv 2304.04487; speculative decoding, arXiv 2211.17192, with a search in
place of a second model) guesses that what followed the last tokens before will follow them again,
and reads the guesses in one pass through the decoder, which costs little more than one token where
reading the weights is what takes the time. On a CPU with two cores a pass over five tokens took
twice as long as over one (Gemma 2B's layers, float32): there it pays from two tokens a pass on.
tests/generation/lookup_counts.py counts how many the demo model's answers give.

What makes good guesses of answers to `detect` and `segment`; see `generate_by_lookup`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.constraints import Constraint
from paligemma_jax.generation.decode import (
    AnswerSettings,
    GeneratedTokens,
    Observer,
    read_prefix,
    real_rows,
)
from paligemma_jax.generation.detection_grammar import CODES, CORNERS, label_paths
from paligemma_jax.generation.sampling import Greedy, likeliest, log_probability
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import MIN_TEXT_LENGTH, Batch, bucket
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES, Tokenizer

NO_GUESS = -1


def alike(tokens: Int[Array, "*shape"], kinds: Sequence[tuple[int, int]]) -> Int[Array, "*shape"]:
    """The tokens, with all of each kind (first id, id behind the last) made the same."""
    for number, (start, end) in enumerate(kinds):
        tokens = jnp.where((tokens >= start) & (tokens < end), NO_GUESS - 1 - number, tokens)
    return tokens


def guess(
    text: Int[Array, "B W"],
    length: Int[Array, " B"],
    number: int,
    longest: int,
    kinds: Sequence[tuple[int, int]] = (),
) -> Int[Array, "B D"]:
    """`number` tokens that may follow the first `length` tokens of each text; -1 for no guess.

    The last tokens, as many of them as possible and at most `longest`, are looked for earlier in
    the text. Tokens of one of `kinds` count as equal to each other there; of places as good the one
    with more tokens that really are equal counts, then the last one. What follows there is the
    guess, and where the text ends it goes on with the guess itself, so that a text that repeats
    itself is guessed to go on repeating.
    """
    ends = jnp.arange(text.shape[1])
    earlier = ends < length[:, None] - 1
    run = jnp.where(earlier, _run(alike(text, kinds), length, longest), 0)
    goodness = run
    if kinds:
        goodness = run * (longest + 1) + jnp.where(run > 0, _run(text, length, longest), 0)
    end = jnp.argmax(goodness * text.shape[1] + ends, axis=1)
    found = jnp.take_along_axis(run, end[:, None], axis=1) > 0
    period = jnp.maximum(length - 1 - end, 1)[:, None]
    guessed = _at(text, end[:, None] + 1 + jnp.arange(number) % period)
    return jnp.where(found, guessed, NO_GUESS)


def _run(text: jax.Array, length: jax.Array, longest: int) -> jax.Array:
    """i32[B, W]: how many tokens up to each place equal the last ones of the text."""
    back = jnp.arange(longest)
    last = _at(text, length[:, None] - 1 - back)  # i32[B, N], last token first
    before = jnp.arange(text.shape[1])[:, None] - back  # i32[W, N]
    same = (text[:, jnp.maximum(before, 0)] == last[:, None]) & (before >= 0)
    return jnp.sum(jnp.cumprod(same, axis=2), axis=2)


def _at(tokens: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tokens, jnp.clip(places, 0, tokens.shape[1] - 1), axis=1)


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


GUESSES = 4
LONGEST = 4  # the four corners of a box


@dataclasses.dataclass(frozen=True)
class LookedUpTokens(GeneratedTokens):
    """An answer, and through how many passes it came.

    Attributes:
      passes: through the decoder; that of the prompt gives the first token, every other one token
        and as many more as guesses before it were right.
    """

    passes: int = 0

    @property
    def tokens_a_pass(self) -> float:
        """Tokens that a pass after the prompt's gave: 1.0 if no guess was ever right."""
        return (len(self.tokens) - 1) / (self.passes - 1) if self.passes > 1 else 1.0


def generate_by_lookup(
    model: PaliGemma,
    batch: Batch,
    *,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    eos_id: int = 1,
    constraint: Constraint | Sequence[Constraint] | None = None,
    observer: Observer | None = None,
    image_tokens: jax.Array | None = None,
    guesses: int = GUESSES,
    longest: int = LONGEST,
    kinds: Sequence[tuple[int, int]] = (),
    references: Sequence[Sequence[int]] = (),
) -> list[LookedUpTokens]:
    """What `generate` answers with Greedy, in fewer passes through the decoder.

    Every token is the likeliest one after exactly the tokens before it, as greedy decoding defines
    it, whatever was guessed. The tokens are the same but for rounding: a pass over several tokens
    adds in another order than a pass over one, so two tokens whose logits differ by no more than
    that (1e-6 in float32, 1e-2 in bfloat16) may change places, as they may in a larger batch.

    Args:
      model: the model.
      batch: the prompts; rows go on at different paces, the slowest ends the loop.
      max_new_tokens: as `generate`, like the next five.
      min_new_tokens: see there.
      eos_id: see there.
      constraint: see there.
      observer: see there.
      image_tokens: see there.
      guesses: tokens that are guessed for a pass.
      longest: how many of the last tokens are looked for at most; at least one must be found.
      kinds: ranges of ids (first, and behind the last) that count as equal when looking for
        tokens, such as all locations: a label is then guessed after any four. See `object_kinds`.
      references: tokens for each row that are looked through too, and not shown to the model: other
        answers that this one may resemble, or the pattern of one. See `object_reference`.

    Raises:
      ConfigError: as `generate`; for a negative number of guesses, or nothing to look for; for
        references that do not match the rows.
    """
    settings = AnswerSettings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampler=Greedy(),
        eos_id=eos_id,
        constraint=constraint,
        observer=observer,
        stop=None,
    )
    if guesses < 0 or longest < 1:
        raise ConfigError(
            f"{guesses} guesses from the last {longest} tokens cannot be made. 0 or more guesses "
            f"from at least 1 token fit. Leave them out for {GUESSES} from {LONGEST}."
        )
    row_mask = real_rows(batch)
    plan = LookupPlan(
        limit=jnp.asarray(max_new_tokens, jnp.int32),
        eos_id=eos_id,
        guesses=guesses,
        longest=longest,
        kinds=tuple(kinds),
        constraint=settings.constraint_of(row_mask, model.config.llm.vocab_size),
        observer=observer,
    )
    text, lengths = _texts(batch, row_mask, references)
    logits, cache = read_prefix(model, batch, image_tokens, room=settings.capacity + guesses)
    # Rows go on at different paces, so each has a length of its own.
    cache = dataclasses.replace(cache, length=jnp.broadcast_to(cache.length, row_mask.shape))
    answers, _ = decode_by_lookup(
        model,
        plan,
        cache,
        logits,
        jnp.asarray(text),
        jnp.asarray(lengths),
        jnp.asarray(row_mask),
        settings.capacity,
    )
    text, logprobs, passes = map(np.asarray, (answers.text, answers.logprobs, answers.passes))
    count = np.asarray(answers.count)
    evidence = None if answers.evidence is None else np.asarray(answers.evidence)
    return [
        LookedUpTokens(
            tokens=tuple(text[row, lengths[row] : lengths[row] + count[row]].tolist()),
            logprobs=tuple(logprobs[row, : count[row]].tolist()),
            evidence=()
            if evidence is None
            else tuple(map(tuple, evidence[row, : count[row]].tolist())),
            passes=int(passes[row]),
        )
        for row in np.flatnonzero(row_mask)
    ]


def _texts(
    batch: Batch, row_mask: np.ndarray, references: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """References directly followed by prompts, i32[B, T] padded behind, and lengths i32[B]."""
    real = np.flatnonzero(row_mask)
    if references and len(references) != real.size:
        raise ConfigError(
            f"{len(references)} references do not match {real.size} prompts. One list of tokens a "
            "prompt, or none at all, fits. Pass references=[[]] * len(prompts) for empty ones."
        )
    own = dict(zip(real.tolist(), references, strict=False))
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask_input).astype(bool)
    rows = [[*own.get(row, ()), *tokens[row, mask[row]].tolist()] for row in range(len(tokens))]
    lengths = np.array([len(row) for row in rows], np.int32)
    text = np.zeros((len(rows), bucket(max(lengths), MIN_TEXT_LENGTH)), np.int32)
    for padded, row in zip(text, rows, strict=True):
        padded[: len(row)] = row
    return text, lengths


def object_kinds(tokenizer: Tokenizer) -> tuple[tuple[int, int], ...]:
    """`kinds`: all locations are alike, and all mask codes."""
    return (
        (tokenizer.loc_start, tokenizer.loc_start + len(LOC_PIECES)),
        (tokenizer.seg_start, tokenizer.seg_start + len(SEG_PIECES)),
    )


def object_reference(
    tokenizer: Tokenizer, labels: str | Sequence[str], *, masks: bool = False
) -> list[int]:
    """A reference for one row: an object of each label asked for, at no place in particular.

    With it the first label is guessed too, behind the first box (with `masks`, its codes).
    Raises InvalidPromptError for labels that cannot be answered with.
    """
    box = [tokenizer.loc_start] * CORNERS + [tokenizer.seg_start] * CODES * masks
    paths = label_paths(tokenizer, labels, masks)
    return [token for label in paths for token in (*box, *label.again)]
