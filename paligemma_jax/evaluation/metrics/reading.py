"""How well text was read from a picture."""

from typing import Any

from paligemma_jax.evaluation.metrics.accumulator import Values
from paligemma_jax.evaluation.metrics.edit_distance import (
    indel_similarity,
    levenshtein,
    normalized_distance,
)
from paligemma_jax.evaluation.metrics.misfit import check_text
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import Totals, TotalsAccumulator


class Reading(TotalsAccumulator):
    """Error rates and similarities of recognised text; nothing is stripped or made lower case.

    `cer` and `wer`: all edits (`levenshtein`) of characters, and of words between white space, by
    all characters and words of the references; from 0 up, beyond 1 where much is invented. Without
    any in the references, the number of edits itself, as jiwer has it (Morris et al. 2004).
    `levenshtein_ratio`: mean of `indel_similarity` in 0..1, the measure of Roboflow's OCR
    benchmark. `edit_distance`: mean of `normalized_distance` in 0..1, as in maestro. `acc`: share
    without any error. A prediction and a reference are a string each; both may be empty.
    """

    main = "ratio"
    fits = "A prediction (string) and the right text (string) fit."

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text, right = check_text(prediction, "prediction"), check_text(reference, "text")
        words, right_words = text.split(), right.split()
        return {
            "ratio": indel_similarity(text, right),
            "distance": normalized_distance(text, right),
            "acc": float(text == right),
            "character_edits": levenshtein(text, right),
            "characters": len(right),
            "word_edits": levenshtein(words, right_words),
            "words": len(right_words),
        }

    def _finish(self, totals: Totals) -> Values:
        sums = totals.sums
        return {
            "cer": sums["character_edits"] / sums["characters"].clip(1),
            "wer": sums["word_edits"] / sums["words"].clip(1),
            "levenshtein_ratio": totals.mean("ratio"),
            "edit_distance": totals.mean("distance"),
            "acc": totals.mean("acc"),
        }


def reading(predictions: Examples[str], references: Examples[str]) -> dict[str, float]:
    """`Reading` of lists or mappings; raises DatasetError."""
    return Reading().add_all(predictions, references).result()
