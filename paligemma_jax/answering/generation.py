"""Answers as text, with the numbers that came with them."""

import dataclasses
import math

from paligemma_jax.generation.answers import GeneratedTokens
from paligemma_jax.generation.beam import BeamAnswer
from paligemma_jax.generation.lookup import LookedUpTokens
from paligemma_jax.processing.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      text: what was answered, without the stop string that ended it; after the beginning, where
        the answer had one.
      tokens: up to and including what ended the answer: EOS, the token with which a stop string was
        complete, or the last of as many as were allowed.
      logprobs: log-probability (nats) of each token: the model's own, whatever sampler and
        constraint did to the distribution.
      evidence: an observer's numbers for each token, where there was one.
      stop: the stop string that ended the answer, None if none did.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    evidence: tuple[tuple[float, ...], ...] = ()
    stop: str | None = None

    @property
    def logprob(self) -> float:
        """Log-probability (nats) of all tokens together, what ended the answer included."""
        return math.fsum(self.logprobs)

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class LookedUpGeneration(Generation):
    """An answer by prompt lookup, and what the guesses were worth.

    Attributes:
      passes: through the decoder, the one of the prompt included.
      tokens_a_pass: that a pass after the prompt's gave: 1.0 if no guess was ever right.
    """

    passes: int = 0
    tokens_a_pass: float = 1.0


@dataclasses.dataclass(frozen=True)
class BeamGeneration:
    """One answer that beam search found.

    Attributes:
      text: what was answered; after the beginning, where the answer had one.
      tokens: up to and including EOS; without EOS where it was cut.
      logprob: log-probability (nats) of the whole answer.
      score: `logprob / len(tokens) ** alpha`, by which answers are ranked.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    score: float

    def __str__(self) -> str:
        return self.text


def as_generation(row: GeneratedTokens, tokenizer: Tokenizer) -> Generation:
    """What `generate` and `best_of` give as tokens."""
    text = tokenizer.decode(row.tokens)[: row.text_length]
    return Generation(text, row.tokens, row.logprobs, row.evidence, row.stop)


def as_looked_up(row: LookedUpTokens, tokenizer: Tokenizer) -> LookedUpGeneration:
    """What `generate_by_lookup` gives as tokens."""
    return LookedUpGeneration(
        tokenizer.decode(row.tokens),
        row.tokens,
        row.logprobs,
        row.evidence,
        passes=row.passes,
        tokens_a_pass=row.tokens_a_pass,
    )


def as_beam_generation(found: BeamAnswer, tokenizer: Tokenizer) -> BeamGeneration:
    """What `beam_search` gives as tokens."""
    text = tokenizer.decode(found.tokens)
    return BeamGeneration(text, found.tokens, found.logprob, found.score)
