"""Whether an answer is one of the right ones, to the letter."""

from collections.abc import Sequence
from typing import Any

from paligemma_jax.evaluation.metrics.misfit import check_text, check_texts
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import MeanAccumulator


def is_exact(prediction: str, answers: str | Sequence[str], *, lower: bool = False) -> bool:
    """Is the prediction, without white space around it, one of the answers?

    `lower` makes both lower case first. Nothing else is forgiven: no article, point or plural.
    """
    prediction, answers = prediction.strip(), [answers] if isinstance(answers, str) else answers
    if lower:
        return prediction.lower() in {answer.strip().lower() for answer in answers}
    return prediction in {answer.strip() for answer in answers}


class ExactMatch(MeanAccumulator):
    """`acc` in 0..1: share of predictions that are one of the right answers (`is_exact`).

    A prediction is a string, a reference a string or a list of them. This is the measure of GQA and
    xGQA (Hudson and Manning 2019; Pfeiffer et al. 2022), NLVR2 and MaRVL (Suhr et al. 2019; Liu et
    al. 2021; answers True and False), OCR-VQA (Mishra et al. 2019), AI2D (Kembhavi et al. 2016),
    A-OKVQA's multiple choice (Schwenk et al. 2022; the answer is the text of the choice) and of
    questions about videos (MSVD, MSRVTT: Xu et al. 2017; ActivityNet: Yu et al. 2019), as in the
    PaliGemma reports. Toolkits that drop case and punctuation give other numbers for GQA.
    """

    main = "acc"
    fits = "A prediction (string) and its answer (a string, or a list of strings) fit."

    def __init__(self, lower: bool = False):
        super().__init__()
        self.lower = lower

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction")
        if not isinstance(reference, list | tuple):
            reference = [check_text(reference, "answer")]
        answers = check_texts(reference, "answer")
        return {"acc": float(is_exact(text, answers, lower=self.lower))}


def exact_match(
    predictions: Examples[str],
    references: Examples[Any],
    *,
    lower: bool = False,
) -> dict[str, float]:
    """`ExactMatch` of lists or mappings; raises DatasetError."""
    return ExactMatch(lower).add_all(predictions, references).result()
