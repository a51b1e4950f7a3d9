"""Average normalized Levenshtein similarity, for answers read from documents."""

from collections.abc import Sequence
from typing import Any

from paligemma_jax.evaluation.metrics.edit_distance import normalized_distance
from paligemma_jax.evaluation.metrics.misfit import check_text, check_texts
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import MeanAccumulator

THRESHOLD = 0.5


def anls_score(
    prediction: str, answers: Sequence[str], *, threshold: float = THRESHOLD, process: bool = True
) -> float:
    """In 0..1: the best over the answers of 1 - d where d < threshold, else 0.

    d is the Levenshtein distance by the length of the longer string; at exactly the threshold the
    score is 0. `process` makes both sides lower case, strips them and turns every run of white
    space into one space, as the official evaluation does; big_vision, by whose rule PaliGemma is
    reported, makes lower case alone (pass lower-case strings and process=False). Source: Biten et
    al. 2019, Scene Text Visual Question Answering.
    """
    if process:
        prediction, answers = _processed(prediction), [_processed(answer) for answer in answers]
    distances = [normalized_distance(prediction, answer) for answer in answers]
    return max((1 - d if d < threshold else 0.0 for d in distances), default=0.0)


class ANLS(MeanAccumulator):
    """`anls` in 0..1: mean of `anls_score`, and `acc`: share of answers without any error.

    A prediction is a string, a reference a list of at least one. For DocVQA (Mathew et al. 2021),
    InfographicVQA (Mathew et al. 2022) and ST-VQA (Biten et al. 2019).
    """

    main = "anls"
    fits = "A prediction (string) and at least one answer (a list of strings) fit."

    def __init__(self, threshold: float = THRESHOLD, process: bool = True):
        super().__init__()
        self.threshold = threshold
        self.process = process

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text, answers = check_text(prediction, "prediction"), check_texts(reference, "answer")
        if not self.process:
            text, answers = text.lower(), [answer.lower() for answer in answers]
        score = anls_score(text, answers, threshold=self.threshold, process=self.process)
        return {"anls": score, "acc": float(score == 1.0)}


def anls(
    predictions: Examples[str],
    references: Examples[Sequence[str]],
    *,
    threshold: float = THRESHOLD,
    process: bool = True,
) -> dict[str, float]:
    """`ANLS` of lists or mappings; raises DatasetError."""
    return ANLS(threshold, process).add_all(predictions, references).result()


def _processed(text: str) -> str:
    return " ".join(text.lower().split())
