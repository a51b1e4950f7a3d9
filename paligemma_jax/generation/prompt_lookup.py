"""Prompt lookup: greedy decoding in fewer forward passes, by checking several draft tokens at once.

Answers of PaliGemma repeat: labels and separators between boxes, words of the prompt, lines of a
table. Prompt lookup (arXiv 2304.04487; speculative decoding, arXiv 2211.17192, with a search in
place of a second model) drafts that what followed the last tokens before will follow them again. A
pass gives the decoder the last token and D draft tokens, and finds what greedy decoding would
choose after each of them. Where a draft token is the one that was chosen before it, what was chosen
after it is right, too. So every pass writes at least one token, and every token written is the one
that is chosen after exactly the tokens before it. Slots of wrong drafts are overwritten by the next
pass. A pass costs little more than one token where reading the weights is what takes the time. On a
CPU with two cores a pass over five tokens took twice as long as over one (Gemma 2B's layers,
float32): there it pays from two tokens a pass on.

Letters: B batch, T prompt tokens, W tokens of a text at most, D draft tokens, N tokens compared, M
new tokens at most, V vocabulary.
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
from paligemma_jax.generation.config import GenerationConfig, resolve_config
from paligemma_jax.generation.decode import DecodePlan, TokenRecord, read_prompts
from paligemma_jax.generation.detection_grammar import CODES, CORNERS, label_paths
from paligemma_jax.generation.generate import Request
from paligemma_jax.generation.results import Generation
from paligemma_jax.generation.sampling import Greedy, most_probable
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import MIN_TEXT_LENGTH, Batch, bucket
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES, Tokenizer

_STATIC: dict[str, Any] = {"static": True}
NO_DRAFT = -1
DRAFT_TOKENS = 4
MAX_NGRAM_SIZE = 4  # the four corners of a box
TokenClasses = Sequence[tuple[int, int]]


def merge_classes(tokens: Int[Array, "*shape"], classes: TokenClasses) -> Int[Array, "*shape"]:
    """The tokens, with all of each class (first id, id behind the last) made the same."""
    for number, (start, end) in enumerate(classes):
        tokens = jnp.where((tokens >= start) & (tokens < end), NO_DRAFT - 1 - number, tokens)
    return tokens


def draft(
    text: Int[Array, "B W"],
    length: Int[Array, " B"],
    number: int,
    max_ngram_size: int,
    token_classes: TokenClasses = (),
) -> Int[Array, "B D"]:
    """`number` tokens that may follow the first `length` tokens of each text; -1 for none.

    The last tokens, as many of them as possible and at most `max_ngram_size`, are looked for
    earlier in the text. Tokens of one class count as equal there; of places as good the one with
    more tokens that really are equal counts, then the last one. What follows there is the draft,
    and where the text ends it goes on with the draft itself, so that a text that repeats itself is
    expected to go on repeating.
    """
    ends = jnp.arange(text.shape[1])
    earlier = ends < length[:, None] - 1
    merged = merge_classes(text, token_classes)
    run = jnp.where(earlier, _run(merged, length, max_ngram_size), 0)
    goodness = run
    if token_classes:
        equal = jnp.where(run > 0, _run(text, length, max_ngram_size), 0)
        goodness = run * (max_ngram_size + 1) + equal
    end = jnp.argmax(goodness * text.shape[1] + ends, axis=1)
    found = jnp.take_along_axis(run, end[:, None], axis=1) > 0
    period = jnp.maximum(length - 1 - end, 1)[:, None]
    following = _at(text, end[:, None] + 1 + jnp.arange(number) % period)
    return jnp.where(found, following, NO_DRAFT)


def _run(text: jax.Array, length: jax.Array, longest: int) -> jax.Array:
    """i32[B, W]: how many tokens up to each place equal the last ones of the text."""
    back = jnp.arange(longest)
    last = _at(text, length[:, None] - 1 - back)  # i32[B, N], last token first
    before = jnp.arange(text.shape[1])[:, None] - back  # i32[W, N]
    same = (text[:, jnp.maximum(before, 0)] == last[:, None]) & (before >= 0)
    return jnp.sum(jnp.cumprod(same, axis=2), axis=2)


def _at(tokens: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tokens, jnp.clip(places, 0, tokens.shape[1] - 1), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookupPlan:
    """What stays the same from pass to pass: how to decode, and how to draft (see `draft`)."""

    decoding: DecodePlan
    draft_tokens: int = dataclasses.field(metadata=_STATIC)
    max_ngram_size: int = dataclasses.field(metadata=_STATIC)
    token_classes: tuple[tuple[int, int], ...] = dataclasses.field(metadata=_STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookupProgress:
    """What is written so far; the sequences of a batch go on at different paces.

    Attributes:
      count: i32[B], tokens written.
      passes: i32[B], through the decoder, that of the prompt included.
      done: bool[B], the sequence has ended.
      text: i32[B, T + M], what is searched: each prompt (with what stands before it) directly
        followed by its new tokens.
      record: of each new token.
      constraint_state: the constraint's.
    """

    count: jax.Array
    passes: jax.Array
    done: jax.Array
    text: jax.Array
    record: TokenRecord
    constraint_state: Any = None


@functools.partial(Jitted, static_argnames=("capacity",), donate_argnames=("cache",))
def lookup_steps(
    model: PaliGemma,
    plan: LookupPlan,
    cache: KVCache,
    logits: Float[Array, "B V"],
    text: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    sequence_mask: Bool[Array, " B"],
    capacity: int,
) -> tuple[LookupProgress, KVCache]:
    """The loop: generates until every sequence of `sequence_mask` has ended.

    `text` ends with the prompts and is padded behind to T; `lengths` tokens of each are real.
    `capacity` is the room M for tokens, at least the limits; the cache has room for D more, and a
    length for each sequence.
    """
    batch, slots = sequence_mask.shape[0], jnp.arange(cache.valid.shape[1])
    place = jnp.arange(1 + plan.draft_tokens)  # among the tokens of a pass
    last = jnp.max(jnp.where(cache.valid, cache.positions, -1), axis=1)  # of the prompt
    start, prompt = cache.length, cache.valid

    def unfinished(carried: tuple[LookupProgress, KVCache]) -> jax.Array:
        return ~jnp.all(carried[0].done)

    def step(carried: tuple[LookupProgress, KVCache]) -> tuple[LookupProgress, KVCache]:
        progress, cache = carried
        length = lengths + progress.count
        drafts = draft(
            progress.text, length, plan.draft_tokens, plan.max_ngram_size, plan.token_classes
        )
        newest = jnp.take_along_axis(progress.text, length[:, None] - 1, axis=1)
        tokens = jnp.concatenate([newest, jnp.maximum(drafts, 0)], axis=1)
        first = start + progress.count - 1  # the newest token is not in the cache yet
        own = first[:, None] + place
        visible = prompt[:, None] | ((slots >= start[:, None, None]) & (slots <= own[:, :, None]))
        positions = (last + progress.count)[:, None] + place
        cache = dataclasses.replace(cache, length=first)
        logits, cache = model.extend_many(tokens, positions, visible, cache)
        return _accept(plan.decoding, progress, lengths, logits, drafts), cache

    constraint, limit = plan.decoding.constraint, plan.decoding.max_new_tokens
    nothing = LookupProgress(
        count=jnp.zeros((batch,), jnp.int32),
        passes=jnp.zeros((batch,), jnp.int32),
        done=~sequence_mask,
        text=jnp.concatenate([text, jnp.zeros((batch, capacity), jnp.int32)], axis=1),
        record=TokenRecord.empty(plan.decoding, logits, capacity),
        constraint_state=constraint and constraint.start(batch, limit),
    )
    none = jnp.zeros((batch, 0), jnp.int32)
    progress = _accept(plan.decoding, nothing, lengths, logits[:, None], none)
    return jax.lax.while_loop(unfinished, step, (progress, cache))


def _accept(
    plan: DecodePlan,
    progress: LookupProgress,
    lengths: jax.Array,
    logits: jax.Array,
    drafts: jax.Array,
) -> LookupProgress:
    """Adds the tokens chosen from f32[B, 1 + D, V], as long as the drafts before them are right.

    All that depends on the token before (the constraint, what has ended) is taken one by one.
    """
    sequences = jnp.arange(drafts.shape[0])
    following = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=NO_DRAFT)

    def add(
        carried: tuple[LookupProgress, jax.Array], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[LookupProgress, jax.Array], None]:
        progress, right = carried
        logits, drafted = inputs
        state, constraint = progress.constraint_state, plan.constraint
        token = most_probable(plan.allowed(logits, state, progress.count))
        in_record = jnp.where(right, progress.count, progress.record.logprob.shape[1])  # or nowhere
        in_text = jnp.where(right, lengths + progress.count, progress.text.shape[1])
        count = progress.count + right
        done = progress.done | (right & plan.ends(token, count))
        if constraint is not None:
            state = _where(right, constraint.advance(state, token), state)
        record = jax.tree.map(
            lambda old, new: old.at[sequences, in_record].set(new, mode="drop"),
            progress.record,
            TokenRecord.of(plan, logits, token),
        )
        written = LookupProgress(
            count=count,
            passes=progress.passes,
            done=done,
            text=progress.text.at[sequences, in_text].set(token, mode="drop"),
            record=record,
            constraint_state=state,
        )
        return (written, right & ~done & (token == drafted)), None

    active = ~progress.done
    progress = dataclasses.replace(progress, passes=progress.passes + active)
    by_place = (jnp.swapaxes(logits, 0, 1), jnp.swapaxes(following, 0, 1))
    return jax.lax.scan(add, (progress, active), by_place)[0][0]


def _where(chosen: jax.Array, new: Any, old: Any) -> Any:
    """Leaves of `new` for the sequences `chosen`, those of `old` for the rest."""

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(select, new, old)


def prompt_lookup_generate(
    model: PaliGemma,
    batch: Batch,
    tokenizer: Tokenizer | None = None,
    *,
    config: GenerationConfig | None = None,
    image_tokens: jax.Array | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    max_ngram_size: int = MAX_NGRAM_SIZE,
    token_classes: TokenClasses = (),
    draft_corpus: Sequence[Sequence[int]] = (),
    **settings: Any,
) -> list[Generation]:
    """What `generate` returns greedily, in fewer passes through the decoder.

    Every token is the most probable one after exactly the tokens before it, as greedy decoding
    defines it, whatever was drafted. The tokens are the same but for rounding: a pass over several
    tokens adds in another order than a pass over one, so two tokens whose logits differ by no more
    than that (1e-6 in float32, 1e-2 in bfloat16) may change places, as they may in a larger batch.

    Args:
      model, batch, tokenizer, config, image_tokens, **settings: as for `generate`; sequences go on
        at different paces, the slowest ends the loop, and stop strings are looked for at the end.
      draft_tokens: tokens that are drafted for a pass.
      max_ngram_size: how many of the last tokens are looked for at most; at least one must be
        found.
      token_classes: ranges of ids (first, and behind the last) that count as equal when looking for
        tokens, such as all locations: a label is then drafted after any four. See
        `object_token_classes`.
      draft_corpus: tokens for each prompt that are searched, too, and not shown to the model: other
        answers that this one may resemble, or the pattern of one. See `object_draft_corpus`.

    Raises:
      ConfigError: as `generate`; for a negative number of draft tokens, nothing to look for, and a
        corpus for another number of prompts.
    """
    own = ("draft_tokens", "max_ngram_size", "token_classes", "draft_corpus")
    config = resolve_config("prompt_lookup_generate", config, settings, also=own)
    if draft_tokens < 0 or max_ngram_size < 1:
        raise ConfigError(
            f"expected draft_tokens of at least 0 and max_ngram_size of at least 1, got "
            f"{draft_tokens} and {max_ngram_size}."
        )
    greedy = dataclasses.replace(
        config, temperature=None, top_k=None, top_p=None, min_p=None, sampler=Greedy()
    )
    request = Request.of(model, batch, tokenizer, greedy, image_tokens)
    plan = LookupPlan(request.plan, draft_tokens, max_ngram_size, tuple(token_classes))
    mask, capacity = request.sequence_mask, request.capacity
    text, lengths = _texts(batch, mask, draft_corpus)
    logits, cache = read_prompts(model, batch, image_tokens, room=capacity + draft_tokens)
    # Sequences go on at different paces, so each has a length of its own.
    cache = dataclasses.replace(cache, length=jnp.broadcast_to(cache.length, mask.shape))
    arrays = (jnp.asarray(x) for x in (text, lengths, mask))
    progress, _ = lookup_steps(model, plan, cache, logits, *arrays, capacity=capacity)
    text, count, passes = map(np.asarray, (progress.text, progress.count, progress.passes))
    record = {n: np.asarray(x) for n, x in vars(progress.record).items() if x is not None}
    return [
        request.generation(
            number,
            text[i, lengths[i] : lengths[i] + count[i]],
            {name: x[i] for name, x in record.items()},
            forward_passes=int(passes[i]),
        )
        for number, i in enumerate(request.indices)
    ]


def _texts(
    batch: Batch, mask: np.ndarray, draft_corpus: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """The corpus directly followed by prompts, i32[B, T] padded behind, and lengths i32[B]."""
    real = np.flatnonzero(mask)
    if draft_corpus and len(draft_corpus) != real.size:
        raise ConfigError(
            f"draft_corpus: expected a list of tokens for each of {real.size} prompts, got "
            f"{len(draft_corpus)}. Pass [] for a prompt without."
        )
    own = dict(zip(real.tolist(), draft_corpus, strict=False))
    tokens, shown = np.asarray(batch.tokens), np.asarray(batch.mask_input).astype(bool)
    texts = [[*own.get(i, ()), *tokens[i, shown[i]].tolist()] for i in range(len(tokens))]
    lengths = np.array([len(text) for text in texts], np.int32)
    padded = np.zeros((len(texts), bucket(max(lengths), MIN_TEXT_LENGTH)), np.int32)
    for i, text in enumerate(texts):
        padded[i, : len(text)] = text
    return padded, lengths


def object_token_classes(tokenizer: Tokenizer) -> tuple[tuple[int, int], ...]:
    """`token_classes` for objects: all locations are alike, and all mask codes."""
    return (
        (tokenizer.loc_start, tokenizer.loc_start + len(LOC_PIECES)),
        (tokenizer.seg_start, tokenizer.seg_start + len(SEG_PIECES)),
    )


def object_draft_corpus(
    tokenizer: Tokenizer, labels: str | Sequence[str], *, masks: bool = False
) -> list[int]:
    """The `draft_corpus` of one prompt: an object of each label, at no place in particular.

    With it the first label is drafted, too, behind the first box (with `masks`, its codes). Raises
    InvalidPromptError for labels that cannot be answered with.
    """
    box = [tokenizer.loc_start] * CORNERS + [tokenizer.seg_start] * CODES * masks
    paths = label_paths(tokenizer, labels, masks)
    return [token for label in paths for token in (*box, *label.again)]
