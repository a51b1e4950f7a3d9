"""Scores of candidate answers -> probabilities over labels."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from paligemma_jax.generation.scoring import ScoredAnswer
from paligemma_jax.processing.candidates import check_labels


@runtime_checkable
class Normalization(Protocol):
    """The number of an answer that the softmax over the candidates is taken of."""

    def __call__(self, answer: ScoredAnswer) -> float: ...


@dataclasses.dataclass(frozen=True)
class WholeAnswer:
    """Log-probability of the answer, EOS included: Bayes' rule, given that one of them is it.

    Right for a model that was trained to give exactly these answers. EOS is what makes it fair to
    longer labels: "cat" does not get the probability of "cattle", since it has to end.
    """

    def __call__(self, answer: ScoredAnswer) -> float:
        return answer.logprob


@dataclasses.dataclass(frozen=True)
class PerToken:
    """Mean log-probability of a token, as GPT-3 was evaluated (arXiv 2005.14165, section 2.4).

    For labels that the model was not trained to give, of which long ones would never win. What
    comes out ranks the labels; it is no probability of anything.
    """

    def __call__(self, answer: ScoredAnswer) -> float:
        return answer.logprob / answer.length


@dataclasses.dataclass(frozen=True)
class Classification:
    """How a picture's labels compare.

    Attributes:
      answers: each label as an answer, in the order asked for.
      probabilities: of each label, given that it is one of them; they sum to 1.
    """

    answers: tuple[ScoredAnswer, ...]
    probabilities: tuple[float, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order asked for."""
        return tuple(answer.text for answer in self.answers)

    @property
    def best(self) -> str:
        """The likeliest label, the first of equals."""
        return self.ranked()[0][0]

    @property
    def coverage(self) -> float:
        """Probability that the model, asked freely, answers with one of the labels at all.

        Where it is small the labels are not what the model would say, and `probabilities`
        compare unlikely answers with each other.
        """
        return min(1.0, math.fsum(answer.probability for answer in self.answers))

    def ranked(self) -> list[tuple[str, float]]:
        """Labels and probabilities, likeliest first."""
        pairs = zip(self.labels, self.probabilities, strict=True)
        return sorted(pairs, key=lambda pair: -pair[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, likeliest first."""
        logprobs = {answer.text: answer.logprob for answer in self.answers}
        return {
            "label": self.best,
            "coverage": self.coverage,
            "labels": [
                {"label": label, "probability": probability, "logprob": logprobs[label]}
                for label, probability in self.ranked()
            ],
        }

    def __str__(self) -> str:
        return "\n".join(f"{probability:.3f} {label}" for label, probability in self.ranked())


def classify(
    answers: Sequence[ScoredAnswer],
    normalization: Normalization = WholeAnswer(),  # noqa: B008 (frozen)
) -> Classification:
    """Softmax over scored labels, in float64; the labels are checked by `check_labels`."""
    check_labels([answer.text for answer in answers])
    values = [normalization(answer) for answer in answers]
    weights = [math.exp(value - max(values)) for value in values]
    total = math.fsum(weights)
    return Classification(tuple(answers), tuple(weight / total for weight in weights))
