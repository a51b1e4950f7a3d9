"""How sure the model was of each object it named, from the probabilities of the tokens.

Every score is a probability in [0, 1] made of natural logarithms (nats) of token probabilities,
which are those of the model's own distribution, whatever sampler or constraint chose the token.

A box is four location tokens, each chosen given those before, so the product of their probabilities
is the probability that the model gives to exactly this box. It falls with the fineness of the bins:
a model that hesitates between neighbouring bins, 0.1 % of the picture apart, is sure of the object
all the same. Scores called `near` therefore count the mass within 8 bins of the chosen one, and
`good_fit` the mass that is near enough for the size of the box.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.location_tokens import (
    LocationScale,
    ObjectTokens,
    ParsedAnswer,
    parse_tokens,
)
from paligemma_jax.processing.tokenizer import Tokenizer

NEAR_RADII = (2, 4, 8, 16, 32, 64, 128)  # bins around the chosen one that mass is noted for
_FINE = NEAR_RADII.index(8)
_SLACK = 1 / 8  # of a side of the box


@dataclasses.dataclass(frozen=True)
class ObjectEvidence:
    """Log-probabilities (nats) of the tokens that one object was read from.

    `location_mass` is that of any location token at all, and `near_mass` that of the location
    tokens near the chosen one, for each of NEAR_RADII, at each of the four places; None where it
    was not observed. `bins` are the four locations themselves.
    """

    bins: tuple[int, ...]  # 4: y1, x1, y2, x2
    locations: tuple[float, ...]  # 4
    codes: tuple[float, ...]  # 16, or none
    label: tuple[float, ...]  # empty where there is no label
    separators: tuple[float, ...]  # those since the object before
    location_mass: tuple[float, ...] | None = None  # 4
    near_mass: tuple[tuple[float, ...], ...] | None = None  # 4 of 7


_Mass = TypeVar("_Mass")
Score = Callable[[ObjectEvidence], float]


@dataclasses.dataclass(frozen=True)
class WeighedAnswer:
    """An answer, and the evidence of each of its objects in the same order."""

    answer: ParsedAnswer
    evidence: tuple[ObjectEvidence, ...]

    def scores(self, score: Score) -> tuple[float, ...]:
        """`score` of each object."""
        return tuple(score(evidence) for evidence in self.evidence)


def weigh_tokens(
    tokens: Sequence[int],
    logprobs: Sequence[float],
    tokenizer: Tokenizer,
    evidence: Sequence[Sequence[float]] = (),
    scale: LocationScale = LocationScale.BIG_VISION,
) -> WeighedAnswer:
    """Reads an answer's tokens and gathers the evidence of each object.

    Args:
      tokens: ids, as `generate` returns them.
      logprobs: natural logarithm of each token's probability.
      tokenizer: that of the model.
      evidence: for each token the log-mass of all location tokens and of those near the chosen
        one, for each of NEAR_RADII, as `LocationStatistics` measures them; none if it was not
        asked for.
      scale: see `parse_tokens`.

    Raises:
      ConfigError: if the three are not of one length, or the evidence is of other radii.
    """
    if len(logprobs) != len(tokens) or (len(evidence) and len(evidence) != len(tokens)):
        raise ConfigError(
            f"{len(tokens)} tokens, {len(logprobs)} log-probabilities and {len(evidence)} rows of "
            "evidence do not go together. One a token, or no evidence at all, fits. Pass those of "
            "one answer of generate()."
        )
    if len(evidence) and len(evidence[0]) != 1 + len(NEAR_RADII):
        raise ConfigError(
            f"Evidence of {len(evidence[0])} numbers a token cannot be read. {1 + len(NEAR_RADII)} "
            "fit. Generate with: token_statistics=LocationStatistics(tokenizer.loc_start)"
        )
    parsed = parse_tokens(tokens, tokenizer, scale)
    bins = [token - tokenizer.loc_start for token in tokens]
    gathered = [_gather(places, bins, logprobs, evidence) for places in parsed.places]
    return WeighedAnswer(parsed.answer, tuple(gathered))


def location_product(evidence: ObjectEvidence) -> float:
    """Probability of exactly this box: product over its four location tokens."""
    return _probability(sum(evidence.locations))


def location_geometric(evidence: ObjectEvidence) -> float:
    """Geometric mean of the probabilities of the four location tokens."""
    return _probability(sum(evidence.locations) / 4)


def location_minimum(evidence: ObjectEvidence) -> float:
    """Probability of the least sure of the four location tokens."""
    return _probability(min(evidence.locations))


def near_product(evidence: ObjectEvidence) -> float:
    """Product over the four corners of the mass near the chosen location; raises ConfigError."""
    return _probability(sum(_near(evidence)))


def near_geometric(evidence: ObjectEvidence) -> float:
    """Geometric mean over the four corners of the mass near the chosen one; raises ConfigError."""
    return _probability(sum(_near(evidence)) / 4)


def near_minimum(evidence: ObjectEvidence) -> float:
    """Least of the four corners' masses near the chosen location; raises ConfigError."""
    return _probability(min(_near(evidence)))


def good_fit(evidence: ObjectEvidence) -> float:
    """Probability that every edge is within an eighth of the box's own side; raises ConfigError.

    Were all four edges off by so much, inward, the overlap (IoU) would still be (3/4)^2 = 0.56, and
    outward (4/5)^2 = 0.64: so this is, by the model's own belief, at least the probability of a box
    that counts as right at the usual overlap of 0.5. Between the radii that mass was noted for, it
    is taken to grow evenly.
    """
    return math.prod(_edge_fits(evidence))


def mean_fit(evidence: ObjectEvidence) -> float:
    """Geometric mean over the four edges of what `good_fit` multiplies; raises ConfigError.

    It ranks as `good_fit` does. Edges that are all a little unsure leave the overlap high, so it
    comes nearer to the share of boxes that are right.
    """
    return math.prod(_edge_fits(evidence)) ** 0.25


def label_product(evidence: ObjectEvidence) -> float:
    """Probability of the label given the box; 1 where there is no label."""
    return _probability(sum(evidence.label))


def label_geometric(evidence: ObjectEvidence) -> float:
    """Geometric mean of the label's token probabilities; 1 where there is no label."""
    return _probability(sum(evidence.label) / max(1, len(evidence.label)))


def mask_geometric(evidence: ObjectEvidence) -> float:
    """Geometric mean of the probabilities of the 16 mask codes; 1 where there is no mask."""
    return _probability(sum(evidence.codes) / max(1, len(evidence.codes)))


def box_start(evidence: ObjectEvidence) -> float:
    """Mass of all location tokens where the first stands: a box rather than the end of the answer.

    After a separator a box follows nearly always, so it tells least of the second object and later
    ones; see `objectness`. Raises ConfigError without observed mass.
    """
    return _probability(_observed(evidence.location_mass)[0])


def objectness(evidence: ObjectEvidence) -> float:
    """Probability that there is one more object: `box_start` times that of the separator before.

    The answer ends where the separator would stand. Raises ConfigError without observed mass.
    """
    return _probability(sum(evidence.separators) + _observed(evidence.location_mass)[0])


@dataclasses.dataclass(frozen=True)
class ProductOf:
    """The product of several scores, such as `ProductOf((objectness, near_geometric))`."""

    factors: tuple[Score, ...]

    def __call__(self, evidence: ObjectEvidence) -> float:
        return math.prod(score(evidence) for score in self.factors)


def _gather(
    places: ObjectTokens,
    bins: Sequence[int],
    logprobs: Sequence[float],
    evidence: Sequence[Sequence[float]],
) -> ObjectEvidence:
    def pick(chosen: Sequence[int]) -> tuple[float, ...]:
        return tuple(float(logprobs[place]) for place in chosen)

    rows = [evidence[place] for place in places.locations] if len(evidence) else []
    return ObjectEvidence(
        tuple(bins[place] for place in places.locations),
        pick(places.locations),
        pick(places.codes),
        pick(places.label),
        pick(places.separators),
        tuple(float(row[0]) for row in rows) or None,
        tuple(tuple(map(float, row[1:])) for row in rows) or None,
    )


def _edge_fits(evidence: ObjectEvidence) -> list[float]:
    """For each edge the probability that it is within an eighth of the side across it."""
    y1, x1, y2, x2 = evidence.bins
    fits = []
    for place, masses in enumerate(_observed(evidence.near_mass)):
        side = (y2 - y1, x2 - x1)[place % 2]
        shares = (_probability(evidence.locations[place]), *map(_probability, masses))
        fits.append(float(np.interp(side * _SLACK, (0, *NEAR_RADII), shares)))
    return fits


def _near(evidence: ObjectEvidence) -> tuple[float, ...]:
    return tuple(masses[_FINE] for masses in _observed(evidence.near_mass))


def _observed(mass: tuple[_Mass, ...] | None) -> tuple[_Mass, ...]:
    if mass is None:
        raise ConfigError(
            "The mass around the locations was not observed while the answer was generated. An "
            "answer with evidence fits. Generate with: "
            "token_statistics=LocationStatistics(tokenizer.loc_start)"
        )
    return mass


def _probability(nats: float) -> float:
    # Sums of float32 probabilities can pass 1 in their last bit.
    return min(1.0, math.exp(nats))


# Of those measured (benchmarks.md) the best by rank and calibration together: is there one more
# object, is it of this label, and do its edges fit?
box_score: Score = ProductOf((objectness, label_product, mean_fit))
