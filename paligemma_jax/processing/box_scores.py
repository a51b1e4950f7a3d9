"""Score of a detected box from the probabilities of its tokens.

A box is four location tokens, each chosen given those before, so the product of their probabilities
is the probability of exactly this box. It falls with the fineness of the bins: a model that
hesitates between neighboring bins, 0.1 % of the image apart, is sure of the object all the same.
`box_score` therefore counts the probability mass within a radius that suits the size of the box.
Which score ranks and calibrates best was measured; see benchmarks.md.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.location_tokens import ParsedAnswer, parse_tokens
from paligemma_jax.processing.tokenizer import Tokenizer

NEAR_RADII = (2, 4, 8, 16, 32, 64, 128)  # bins around the chosen one within which mass is known
_SLACK = 1 / 8  # of a side of the box
_Mass = TypeVar("_Mass")


@dataclasses.dataclass(frozen=True)
class ObjectLogprobs:
    """Log-probabilities (nats) of the tokens that one object was read from.

    They are those of the model's own distribution, whatever sampler or constraint chose the token.
    `location_mass` is that of any location token at all, and `near_mass` that of the location
    tokens near the chosen one, for each of NEAR_RADII, at each of the four locations; None where it
    was not measured. `bins` are the four locations themselves.
    """

    bins: tuple[int, ...]  # 4: y1, x1, y2, x2
    locations: tuple[float, ...]  # 4
    label: tuple[float, ...] = ()  # empty where there is no label
    separators: tuple[float, ...] = ()  # those since the object before
    location_mass: tuple[float, ...] | None = None  # 4
    near_mass: tuple[tuple[float, ...], ...] | None = None  # 4 of 7


Score = Callable[[ObjectLogprobs], float]


@dataclasses.dataclass(frozen=True)
class AnswerLogprobs:
    """An answer, and the log-probabilities of each of its objects in the same order."""

    answer: ParsedAnswer
    objects: tuple[ObjectLogprobs, ...]

    def scores(self, score: "Score | None" = None) -> tuple[float, ...]:
        """`score` of each object; `box_score` if None."""
        return tuple(map(score or box_score, self.objects))


def parse_logprobs(
    tokens: Sequence[int],
    logprobs: Sequence[float],
    tokenizer: Tokenizer,
    extras: Sequence[Sequence[float]] = (),
) -> AnswerLogprobs:
    """Parses an answer's tokens and gathers the log-probabilities of each object.

    Args:
      tokens: ids, as `generate` returns them.
      logprobs: natural logarithm of each token's probability.
      tokenizer: that of the model.
      extras: for each token the log-mass of all location tokens and of those near the chosen one,
        for each of NEAR_RADII, as LocationStatistics measures them; empty if not measured.

    Raises:
      ConfigError: if the three are not of one length, or the extras are of other radii.
    """
    if len(logprobs) != len(tokens) or (len(extras) and len(extras) != len(tokens)):
        raise ConfigError(
            "Expected a log-probability, and extras or none, for each token; got "
            f"{len(tokens)} tokens, {len(logprobs)} log-probabilities and {len(extras)} extras."
        )
    if len(extras) and len(extras[0]) != 1 + len(NEAR_RADII):
        raise ConfigError(
            f"Expected extras of {1 + len(NEAR_RADII)} numbers a token, got {len(extras[0])}. "
            "Generate with: token_statistics=LocationStatistics(tokenizer.loc_start)"
        )
    parsed = parse_tokens(tokens, tokenizer)

    def pick(indices: Sequence[int]) -> tuple[float, ...]:
        return tuple(float(logprobs[index]) for index in indices)

    objects = []
    for own in parsed.tokens:
        near = [extras[index] for index in own.locations] if len(extras) else []
        objects.append(
            ObjectLogprobs(
                tuple(tokens[index] - tokenizer.loc_start for index in own.locations),
                pick(own.locations),
                pick(own.label),
                pick(own.separators),
                tuple(float(numbers[0]) for numbers in near) or None,
                tuple(tuple(map(float, numbers[1:])) for numbers in near) or None,
            )
        )
    return AnswerLogprobs(parsed.answer, tuple(objects))


def box_score(logprobs: ObjectLogprobs) -> float:
    """Probability in 0..1 that there is one more object, of this label, with edges about here.

    Raises ConfigError where the mass around the locations was not measured.
    """
    return objectness(logprobs) * probability(sum(logprobs.label)) * edge_score(logprobs)


def objectness(logprobs: ObjectLogprobs) -> float:
    """Probability that there is one more object: of the separator before, then of any location.

    The answer ends where the separator would stand.
    """
    return probability(sum(logprobs.separators) + measured(logprobs.location_mass)[0])


def edge_score(logprobs: ObjectLogprobs) -> float:
    """Geometric mean over the edges of the probability that each is near enough.

    That is within an eighth of the box's own side. Were all four edges off by so much, inward, the
    overlap (IoU) would still be (3/4)^2 = 0.56, and outward (4/5)^2 = 0.64: enough for a box that
    counts as right at the usual overlap of 0.5. Between the radii that mass is known for, it is
    taken to grow linearly.
    """
    y1, x1, y2, x2 = logprobs.bins
    fractions = []
    for edge, masses in enumerate(measured(logprobs.near_mass)):
        side = (y2 - y1, x2 - x1)[edge % 2]
        known = (probability(logprobs.locations[edge]), *map(probability, masses))
        fractions.append(float(np.interp(side * _SLACK, (0, *NEAR_RADII), known)))
    return math.prod(fractions) ** 0.25


def measured(mass: tuple[_Mass, ...] | None) -> tuple[_Mass, ...]:
    """The mass; raises ConfigError for None."""
    if mass is None:
        raise ConfigError(
            "The probability mass around the locations was not measured. Generate with: "
            "token_statistics=LocationStatistics(tokenizer.loc_start)"
        )
    return mass


def probability(nats: float) -> float:
    """Of a log-probability; sums of float32 numbers can pass 1 in their last bit."""
    return min(1.0, math.exp(nats))
