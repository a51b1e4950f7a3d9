"""Accuracy that forgives a number 5 %, for answers read from charts."""

import math
from typing import Any

from paligemma_jax.evaluation.metrics.misfit import check_text
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import MeanAccumulator

TOLERANCE = 0.05


def is_relaxed_match(
    prediction: str, answer: str, *, tolerance: float = TOLERANCE, lower: bool = True
) -> bool:
    """Are both numbers, with |prediction - answer| <= tolerance * |answer|, or else equal strings?

    A percent sign at the end divides by 100, so 5% and 0.05 are equal. An answer of 0, and numbers
    that are not finite, are compared as strings. Strings are stripped, and made lower case with
    `lower`, big_vision's setting. Source: Masry et al. 2022, ChartQA; after Methani et al. 2020.
    """
    right, given = _number(answer), _number(prediction)
    if right and given is not None:
        return abs(given - right) <= tolerance * abs(right)
    return _equal(prediction, answer, lower=lower)


class RelaxedAccuracy(MeanAccumulator):
    """`relaxed_acc` in 0..1: share of `is_relaxed_match`; and `acc`, of equal strings.

    A prediction and a reference are a string each. ChartQA's published number is the mean over the
    splits human and augmented: `ByGroup(RelaxedAccuracy(), {"mean": ("human", "augmented")})`.
    """

    main = "relaxed_acc"
    fits = "A prediction (string) and its answer (string) fit."

    def __init__(self, tolerance: float = TOLERANCE, lower: bool = True):
        super().__init__()
        self.tolerance = tolerance
        self.lower = lower

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text, answer = check_text(prediction, "prediction"), check_text(reference, "answer")
        relaxed = is_relaxed_match(text, answer, tolerance=self.tolerance, lower=self.lower)
        return {
            "relaxed_acc": float(relaxed),
            "acc": float(_equal(text, answer, lower=self.lower)),
        }


def relaxed_accuracy(
    predictions: Examples[str],
    references: Examples[str],
    *,
    tolerance: float = TOLERANCE,
    lower: bool = True,
) -> dict[str, float]:
    """`RelaxedAccuracy` of lists or mappings; raises DatasetError."""
    return RelaxedAccuracy(tolerance, lower).add_all(predictions, references).result()


def _equal(first: str, second: str, *, lower: bool) -> bool:
    first, second = first.strip(), second.strip()
    return first.lower() == second.lower() if lower else first == second


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
