"""Accuracy of questions that count only where all about one thing are right."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Accumulator, Measure, Values
from paligemma_jax.evaluation.metrics.exact_match import is_exact
from paligemma_jax.evaluation.metrics.misfit import Misfit, check_text, refuse
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import divide


@dataclasses.dataclass(frozen=True)
class OfPair:
    """The right answer to a question, and the name of the pair that the question belongs to."""

    pair: str | int
    answer: str


class PairedAccuracy(Accumulator):
    """`pair_acc` in 0..1: share of pairs of which both answers are right; `acc`: of all answers.

    Stripped and lower-case answers are compared. A prediction is a string, a reference an
    `OfPair`; every pair must have `size` questions by the end. Source: Tong et al. 2024, MMVP (150
    pairs). With the pair being one sentence over several pictures this is NLVR2's consistency
    (Suhr et al. 2019), whose groups differ in size: size=None.
    """

    fits = "A prediction (string) and an OfPair(pair, answer) fit."

    def __init__(self, size: int | None = 2):
        super().__init__()
        self.size = size

    def _row(self, prediction: Any, reference: Any) -> tuple[str | int, bool]:
        text = check_text(prediction, "prediction")
        if not isinstance(reference, OfPair):
            raise Misfit(f"the reference is of type {type(reference).__name__}, not OfPair")
        return reference.pair, is_exact(text, check_text(reference.answer, "answer"), lower=True)

    def _measure(self, rows: Sequence[tuple[str | int, bool]]) -> Measure:
        members: dict[str | int, list[int]] = {}
        for place, (pair, _) in enumerate(rows):
            members.setdefault(pair, []).append(place)
        wrong = {p: len(m) for p, m in members.items() if self.size and len(m) != self.size}
        if wrong:
            raise refuse(
                [f"{pair!r} has {count} questions" for pair, count in wrong.items()],
                f"Pairs of {self.size} questions fit.",
                "Add what is missing, or: PairedAccuracy(size=None)",
            )
        right = np.array([row[1] for row in rows], np.float64)
        first = np.array([places[0] for places in members.values()])
        both = np.array([right[places].all() for places in members.values()], np.float64)

        def measure(weights: np.ndarray) -> Values:
            pairs = weights[:, first]  # all members of a pair weigh alike
            return {
                "pair_acc": divide(pairs @ both, pairs.sum(axis=1)),
                "acc": divide(weights @ right, weights.sum(axis=1)),
            }

        return measure

    def _scores(self, rows: Sequence[tuple[str | int, bool]]) -> np.ndarray:
        return np.array([right for _, right in rows], np.float64)

    def _row_units(self, rows: Sequence[tuple[str | int, bool]]) -> list[Hashable]:
        return [pair for pair, _ in rows]


def paired_accuracy(
    predictions: Examples[str],
    references: Examples[OfPair],
    *,
    size: int | None = 2,
) -> dict[str, float]:
    """`PairedAccuracy` of lists or mappings; raises DatasetError."""
    return PairedAccuracy(size).add_all(predictions, references).result()
