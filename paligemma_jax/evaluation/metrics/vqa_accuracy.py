"""Accuracy of an answer that several people were asked for."""

from collections.abc import Sequence
from typing import Any

from paligemma_jax.evaluation.metrics.anls import anls_score
from paligemma_jax.evaluation.metrics.misfit import check_text, check_texts
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import MeanAccumulator
from paligemma_jax.evaluation.metrics.vqa_processing import process_answer, strip_space

PEOPLE = 10  # answers to each question of VQAv2, TextVQA and VizWiz


def vqa_v2_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """In 0..1: the mean, over leaving out each answer, of min(1, matches among the others / 3).

    Both sides have white space stripped; unless all answers are then the same, both go through
    `process_answer`. Sources: Antol et al. 2015 and Goyal et al. 2017 (VQA, VQAv2), and big_vision,
    which treats VQAv2 and TextVQA so.
    """
    prediction, answers = strip_space(prediction), [strip_space(a) for a in answers]
    if len(set(answers)) > 1:
        prediction, answers = process_answer(prediction), [process_answer(a) for a in answers]
    matches = sum(answer == prediction for answer in answers)
    misses = len(answers) - matches
    if not matches:
        return 0.0
    # Leaving out one of the matching answers leaves matches - 1, leaving out another all.
    return (matches * min(1, (matches - 1) / 3) + misses * min(1, matches / 3)) / len(answers)


def simple_vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """In 0..1: min(1, matches / 3), to the letter.

    big_vision's rule for OKVQA, A-OKVQA (direct answer) and VizWiz: nothing is processed and no
    answer left out, so the number is not that of the official evaluation of those.
    """
    return min(1.0, sum(answer == prediction for answer in answers) / 3)


class VQAv2Accuracy(MeanAccumulator):
    """`acc` in 0..1: mean of `vqa_v2_accuracy`. For VQAv2, TextVQA, and VizWiz's official number.

    A prediction is a string, a reference a list of exactly `people` strings.
    """

    main = "acc"

    def __init__(self, people: int = PEOPLE):
        super().__init__()
        self.people = people
        self.fits = f"A prediction (string) and {people} answers (a list of strings) fit."

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction")
        return {"acc": vqa_v2_accuracy(text, check_texts(reference, "answer", self.people))}


class SimpleVQAAccuracy(MeanAccumulator):
    """`acc`, `acc_any` and `anls`, all in 0..1: means of big_vision's three figures.

    They are `simple_vqa_accuracy`, whether any answer matches, and the best `anls_score` without
    stripping; `lower` makes both sides lower case first. A prediction is a string, a reference a
    list of at least one. For OKVQA (Marino et al. 2019), A-OKVQA (Schwenk et al. 2022), VizWiz
    (Gurari et al. 2018).
    """

    main = "acc"
    fits = "A prediction (string) and at least one answer (a list of strings) fit."

    def __init__(self, lower: bool = False):
        super().__init__()
        self.lower = lower

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction")
        answers = check_texts(reference, "answer")
        if self.lower:
            text, answers = text.lower(), [answer.lower() for answer in answers]
        return {
            "acc": simple_vqa_accuracy(text, answers),
            "acc_any": float(text in answers),
            "anls": anls_score(text, answers, process=False),
        }


def vqa_v2(
    predictions: Examples[str],
    references: Examples[Sequence[str]],
) -> dict[str, float]:
    """`VQAv2Accuracy` of lists or mappings; raises DatasetError."""
    return VQAv2Accuracy().add_all(predictions, references).result()


def simple_vqa(
    predictions: Examples[str],
    references: Examples[Sequence[str]],
    *,
    lower: bool = False,
) -> dict[str, float]:
    """`SimpleVQAAccuracy` of lists or mappings; raises DatasetError."""
    return SimpleVQAAccuracy(lower).add_all(predictions, references).result()
