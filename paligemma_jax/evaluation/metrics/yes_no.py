"""Yes or no: accuracy, precision, recall, F1 and how often the answer is yes."""

from typing import Any

from paligemma_jax.evaluation.metrics.accumulator import Values
from paligemma_jax.evaluation.metrics.misfit import Misfit, check_text
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import Totals, TotalsAccumulator, divide


class YesNo(TotalsAccumulator):
    """Figures in 0..1 of answers that should be yes or no, yes being the positive one.

    `acc` is the share of right answers, `precision` that of right ones among the answers yes,
    `recall` that of yes among the questions to which it is right, `f1` their harmonic mean,
    `yes_ratio` the share of answers that are yes, and `valid` that of answers that are yes or no.
    Answers are stripped and made lower case; any other is wrong, and counts as not yes. Precision
    is 0 if no answer is yes, recall if none should be. A prediction and a reference are a string
    each, or a reference a bool. Source: Li et al. 2023, POPE, reported for its splits random,
    popular and adversarial: `ByGroup(YesNo(), {"mean": None})`. (lmms-eval's yes-ratio is that of
    the references.)
    """

    main = "acc"
    fits = 'A prediction (string) and "yes" or "no" (or a bool) fit.'

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction").strip().lower()
        if isinstance(reference, bool):
            reference = "yes" if reference else "no"
        right = check_text(reference, "answer").strip().lower()
        if right not in ("yes", "no"):
            raise Misfit(f"the answer {reference!r} is neither yes nor no")
        return {
            "acc": float(text == right),
            "hit": float(text == right == "yes"),
            "yes": float(text == "yes"),
            "positive": float(right == "yes"),
            "valid": float(text in ("yes", "no")),
        }

    def _finish(self, totals: Totals) -> Values:
        precision = totals.ratio("hit", "yes", empty=0.0)
        recall = totals.ratio("hit", "positive", empty=0.0)
        return {
            "acc": totals.mean("acc"),
            "precision": precision,
            "recall": recall,
            "f1": divide(2 * precision * recall, precision + recall, 0.0),
            "yes_ratio": totals.mean("yes"),
            "valid": totals.mean("valid"),
        }

    def confusion(self) -> dict[str, dict[str, int]]:
        """How often each right answer (first key) was given each answer: yes, no or other."""
        answers = ("yes", "no", "other")
        counts = {right: {answer: 0 for answer in answers} for right in ("yes", "no")}
        for row in self._rows.values():
            given = "yes" if row["yes"] else "no" if row["valid"] else "other"
            counts["yes" if row["positive"] else "no"][given] += 1
        return counts


def yes_no(
    predictions: Examples[str],
    references: Examples[str | bool],
) -> dict[str, float]:
    """`YesNo` of lists or mappings; raises DatasetError."""
    return YesNo().add_all(predictions, references).result()
