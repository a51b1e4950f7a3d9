"""ROUGE-L of captions: the longest common subsequence of words."""

from collections.abc import Sequence
from typing import Any

from paligemma_jax.evaluation.metrics.captions import (
    DEFAULT_TOKENIZER,
    FITS,
    Tokenizer,
    read_captions,
)
from paligemma_jax.evaluation.metrics.edit_distance import longest_common_subsequence
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import MeanAccumulator

_BETA = 1.2


class RougeL(MeanAccumulator):
    """`rouge-l` in 0..1: mean of an F measure that favours recall (beta 1.2).

    Precision is the longest common subsequence by the words of the caption, recall by those of the
    reference, each the best over the references. A prediction is a string, a reference a list of at
    least one. Source: Lin 2004; as in pycocoevalcap.
    """

    fits = FITS
    main = "rouge-l"

    def __init__(self, tokenizer: Tokenizer = DEFAULT_TOKENIZER):
        super().__init__()
        self.tokenizer = tokenizer

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        words, references = read_captions(prediction, reference, self.tokenizer)
        common = [longest_common_subsequence(words, one) for one in references]
        precision = max(common) / max(1, len(words))
        recall = max(c / max(1, len(one)) for c, one in zip(common, references, strict=True))
        if not precision or not recall:
            return {"rouge-l": 0.0}
        square = _BETA**2
        return {"rouge-l": (1 + square) * precision * recall / (recall + square * precision)}


def rouge_l(
    predictions: Examples[str],
    references: Examples[Sequence[str]],
    *,
    tokenizer: Tokenizer = DEFAULT_TOKENIZER,
) -> dict[str, float]:
    """`RougeL` of lists or mappings; raises DatasetError."""
    return RougeL(tokenizer).add_all(predictions, references).result()
