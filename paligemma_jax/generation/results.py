"""What every kind of generation returns, and the events of a stream."""

import dataclasses
import math
from typing import Literal

FinishReason = Literal["eos", "stop", "length"]
TokenLogprob = tuple[int, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One generated sequence; `str(generation)` is its text.

    Attributes:
      text: of the tokens, cut before the stop string that ended it; what follows the answer prefix
        where there was one. Empty where no tokenizer was given.
      tokens: up to and including what ended the sequence: EOS, the token that completed a stop
        string, or the last of `max_new_tokens`.
      logprobs: log-probability (nats) of each token: the model's own, whatever sampler and
        constraint did to the distribution.
      finish_reason: "eos", "stop" (a stop string) or "length" (`max_new_tokens`).
      prompt_tokens: text tokens that were read, bos and newline included.
      image_tokens: image tokens that were read.
      stop: the stop string that ended the sequence, None if none did.
      top_logprobs: for each token the most probable alternatives as (id, log-probability), most
        probable first; empty unless `top_logprobs` asked for them.
      extras: for each token the numbers of `token_statistics`; empty without.
      score: what beam search and best-of-n rank by, logprob / len(tokens) ** length_penalty; None
        where nothing is ranked.
      forward_passes: of prompt lookup, that of the prompt included; None elsewhere.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    prompt_tokens: int = 0
    image_tokens: int = 0
    stop: str | None = None
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    extras: tuple[tuple[float, ...], ...] = ()
    score: float | None = None
    forward_passes: int | None = None

    @property
    def logprob(self) -> float:
        """Log-probability (nats) of all tokens together, what ended the sequence included."""
        return math.fsum(self.logprobs)

    @property
    def tokens_per_forward_pass(self) -> float:
        """Tokens per pass after the prompt's: above 1 where prompt lookup saved passes."""
        if self.forward_passes is None or self.forward_passes < 2:
            return 1.0
        return (len(self.tokens) - 1) / (self.forward_passes - 1)

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationEvent:
    """News of one sequence of a stream; `str(event)` is its text.

    The texts of a sequence's events, joined, are `Generation.text`; likewise tokens and logprobs.
    Text may come later than its tokens: it never ends inside a character, and holds back what may
    become a stop string.

    Attributes:
      text: what is new; may be empty in the last event.
      tokens: what is new.
      logprobs: of these tokens.
      index: which prompt of the batch it is about.
      generation: the whole result in a sequence's last event, None before.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    index: int = 0
    generation: Generation | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ended; None before its last event."""
        return None if self.generation is None else self.generation.finish_reason

    def __str__(self) -> str:
        return self.text
