"""From a filled cache to the answers of its rows, as Python values.

What `generate` and `best_of` have in common once the prompts are read.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.combining import at_least
from paligemma_jax.generation.constraint import Constraint, for_batch
from paligemma_jax.generation.loop import (
    DecodePlan,
    DecodeState,
    continue_decoding,
    decode,
    start_decoding,
)
from paligemma_jax.generation.observer import Observer
from paligemma_jax.generation.sampling import Sampler
from paligemma_jax.generation.stopping import StopStrings
from paligemma_jax.models.cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.buckets import bucket

MIN_CAPACITY = 16  # new tokens; room is made for a power of two of at least so many
CHUNK = 8  # tokens between two looks for stop strings


@dataclasses.dataclass(frozen=True)
class GeneratedTokens:
    """One row's answer: its tokens, and the log-probability (nats) of each.

    Log-probabilities are those of the model, whatever sampler and constraint did to the
    distribution. `evidence` holds an observer's numbers for each token.

    An answer goes up to and including what ended it: EOS, the token with which a stop string was
    complete, or the last of as many as were allowed. `stop` is the stop string that ended it, and
    the text is then cut before it: tokenizer.decode(tokens)[:text_length].
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    evidence: tuple[tuple[float, ...], ...] = ()
    stop: str | None = None
    text_length: int | None = None  # characters; None: all

    @property
    def logprob(self) -> float:
        """Log-probability (nats) of all tokens together, what ended the answer included."""
        return math.fsum(self.logprobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """What may be asked of answers besides the prompts; see `generate` for each.

    Raises ConfigError for numbers of tokens that no answer can have.
    """

    max_new_tokens: int
    min_new_tokens: int
    sampler: Sampler
    eos_id: int
    constraint: Constraint | Sequence[Constraint] | None
    observer: Observer | None
    stop: StopStrings | None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens}; nothing can be generated. It must be at "
                "least 1."
            )
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens is {self.min_new_tokens}, with max_new_tokens "
                f"{self.max_new_tokens}. From 0 to that many fit. "
                f"Pass max_new_tokens={max(self.min_new_tokens, 1)}"
            )

    @property
    def capacity(self) -> int:
        """Room for new tokens, in few different sizes."""
        return bucket(self.max_new_tokens, MIN_CAPACITY)

    def constraint_of(self, row_mask: np.ndarray, vocab_size: int) -> Constraint | None:
        """Of a whole batch, checked; with `min_new_tokens` in it."""
        constraint = self.constraint
        if self.min_new_tokens:
            constraint = at_least(self.min_new_tokens, self.eos_id, constraint)
        if constraint is None:
            return None
        return for_batch(constraint, row_mask, vocab_size, self.max_new_tokens)


def answer_rows(
    model: PaliGemma,
    settings: AnswerSettings,
    constraint: Constraint | None,
    logits: jax.Array,
    cache: KVCache,
    row_mask: np.ndarray,
    seeds: np.ndarray,
) -> list[GeneratedTokens]:
    """Answers the rows of `row_mask` bool[B], from what prefill gave: one of each, in order.

    `constraint` is `settings.constraint_of(...)`; `seeds` u32[B]. The cache is used up.
    """
    limit = jnp.asarray(settings.max_new_tokens, jnp.int32)
    plan = DecodePlan(
        jnp.asarray(seeds), limit, settings.sampler, settings.eos_id, constraint, settings.observer
    )
    rows = jnp.asarray(row_mask)
    if settings.stop is None:
        tokens, logprobs, _, evidence = decode(
            model,
            cache,
            logits,
            rows,
            plan.seeds,
            limit,
            sampler=plan.sampler,
            capacity=settings.capacity,
            eos_id=plan.eos_id,
            constraint=constraint,
            observer=plan.observer,
        )
    else:
        state = start_decoding(plan, cache, logits, rows, settings.capacity)
        progress = _until_stopped(model, state, settings.stop).progress
        tokens, logprobs, evidence = progress.tokens, progress.logprobs, progress.evidence
    tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
    seen = None if evidence is None else np.asarray(evidence)
    return [
        _cut(
            settings,
            tokens[row, : settings.max_new_tokens],
            logprobs[row],
            None if seen is None else seen[row],
        )
        for row in np.flatnonzero(row_mask)
    ]


def _until_stopped(model: PaliGemma, state: DecodeState, stop: StopStrings) -> DecodeState:
    """Decodes to the end, looking for stop strings every few tokens."""
    state = continue_decoding(model, state, CHUNK - 1)  # one is there already
    while True:
        progress = state.progress
        written = np.asarray(progress.tokens)[:, : int(progress.step)]
        done = np.asarray(progress.done)
        found = [
            not ended and stop.find(row) is not None
            for row, ended in zip(written, done, strict=True)
        ]
        if any(found):
            state = state.end_rows(np.array(found))
        if state.finished:
            return state
        state = continue_decoding(model, state, CHUNK)


def _cut(
    settings: AnswerSettings,
    tokens: np.ndarray,
    logprobs: np.ndarray,
    evidence: np.ndarray | None,
) -> GeneratedTokens:
    ends = np.flatnonzero(tokens == settings.eos_id)
    length = int(ends[0]) + 1 if ends.size else tokens.size
    found = None if settings.stop is None else settings.stop.find(tokens[:length])
    if found is not None:
        length = found.tokens
    seen = () if evidence is None else evidence[:length].tolist()
    return GeneratedTokens(
        tuple(int(t) for t in tokens[:length]),
        tuple(float(p) for p in logprobs[:length]),
        tuple(map(tuple, seen)),
        stop=None if found is None else found.string,
        text_length=None if found is None else found.characters,
    )
