"""Accuracy and error of counts."""

from typing import Any

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Values
from paligemma_jax.evaluation.metrics.misfit import check_number, check_text
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import Totals, TotalsAccumulator, divide

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
_NUMBERS = {"none": 0} | {word: number for number, word in enumerate(_WORDS)}


def read_count(text: str) -> int | None:
    """The number that an answer is as a whole: digits, or a word from none and zero to twenty.

    Case and outer white space do not count; None for anything else, such as "two cats" or "2.5",
    and for more than 15 digits.
    """
    text = text.strip().lower()
    if text in _NUMBERS:
        return _NUMBERS[text]
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else None


class CountAccuracy(TotalsAccumulator):
    """`acc` in 0..1, share of right counts, and how far the others are off.

    `mae` is the mean of |prediction - truth| and `rmse` the root of the mean square, over the
    predictions that are a count by `read_count`; `no_number` is the share of those that are none,
    which are wrong. A prediction is a string, a reference an int from 0 up, or its digits. For
    TallyQA (Acharya et al. 2019), reported for simple and complex questions: `ByGroup(...)`; and
    for CountBenchQA (Paiss et al. 2023; PaliGemma report). big_vision compares the same way.
    """

    main = "acc"
    fits = "A prediction (string) and the count (int) fit."

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        found = read_count(check_text(prediction, "prediction"))
        if isinstance(reference, str) and read_count(reference) is not None:
            reference = read_count(reference)
        truth = check_number(reference, "count", low=0)
        if found is None:
            return {"acc": 0.0, "no_number": 1.0}
        error = abs(found - truth)
        row = {"acc": float(error == 0), "no_number": 0.0}
        return row | {"error": error, "square": error**2, "counts": 1.0}

    def _finish(self, totals: Totals) -> Values:
        values = {"acc": totals.mean("acc"), "no_number": totals.mean("no_number")}
        if "counts" in totals.sums:
            counts = totals.sums["counts"]
            values["mae"] = divide(totals.sums["error"], counts)
            values["rmse"] = np.sqrt(divide(totals.sums["square"], counts))
        return values


def count_accuracy(predictions: Examples[str], references: Examples[int]) -> dict[str, float]:
    """`CountAccuracy` of lists or mappings; raises DatasetError."""
    return CountAccuracy().add_all(predictions, references).result()
