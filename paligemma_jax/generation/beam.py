"""Beam search: the answers of highest probability that a search of limited width finds."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.beam_loop import BeamPlan, search
from paligemma_jax.generation.constraint import Constraint, PerRow, for_batch
from paligemma_jax.generation.ending import EndAnytime, Ending, EndWhenRanked
from paligemma_jax.generation.generate import MIN_CAPACITY, real_rows
from paligemma_jax.generation.prefix import read_prefix
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.batch import Batch
from paligemma_jax.processing.buckets import bucket


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
