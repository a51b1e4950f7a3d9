"""BLEU of captions: precision of n-grams over all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Values
from paligemma_jax.evaluation.metrics.captions import (
    DEFAULT_TOKENIZER,
    FITS,
    Tokenizer,
    read_captions,
)
from paligemma_jax.evaluation.metrics.ngrams import count_ngrams
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import Totals, TotalsAccumulator

_LONGEST = 4
_TINY, _SMALL = 1e-15, 1e-9  # as in pycocoevalcap: no logarithm of 0, and no division by it


class BLEU(TotalsAccumulator):
    """`bleu-1` to `bleu-4`, in 0..1, of all captions together.

    bleu-k is the geometric mean, for n = 1 to k, of the share of n-grams of the captions that are
    in a reference (each at most as often as in the reference that has it most often), times
    exp(1 - r / c) where the captions are shorter than the references: c words in all against r,
    of each picture those of the reference nearest in length, the shorter of two. A prediction is a
    string, a reference a list of at least one. Source: Papineni et al. 2002; as in pycocoevalcap,
    without smoothing. SciCap is reported in bleu-4.
    """

    fits = FITS
    main = "sentence"

    def __init__(self, tokenizer: Tokenizer = DEFAULT_TOKENIZER):
        super().__init__()
        self.tokenizer = tokenizer

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        words, references = read_captions(prediction, reference, self.tokenizer)
        most = count_ngrams(())
        for one in references:
            most |= count_ngrams(one)
        found = count_ngrams(words) & most
        row: dict[str, float] = {
            "caption": len(words),
            "reference": min((abs(len(r) - len(words)), len(r)) for r in references)[1],
        }
        for n in range(1, _LONGEST + 1):
            row[f"right{n}"] = sum(times for ngram, times in found.items() if len(ngram) == n)
            row[f"all{n}"] = max(0, len(words) - n + 1)
        alone = _bleu({name: np.array([value]) for name, value in row.items()})
        return row | {"sentence": float(alone[f"bleu-{_LONGEST}"][0])}

    def _finish(self, totals: Totals) -> Values:
        return _bleu(totals.sums)


def bleu(
    predictions: Examples[str],
    references: Examples[Sequence[str]],
    *,
    tokenizer: Tokenizer = DEFAULT_TOKENIZER,
) -> dict[str, float]:
    """`BLEU` of lists or mappings; raises DatasetError."""
    return BLEU(tokenizer).add_all(predictions, references).result()


def _bleu(sums: Mapping[str, np.ndarray]) -> Values:
    ratio = (sums["caption"] + _TINY) / (sums["reference"] + _SMALL)
    brevity = np.where(ratio < 1, np.exp(np.minimum(0, 1 - 1 / ratio)), 1.0)
    values, product = {}, np.ones_like(ratio)
    for n in range(1, _LONGEST + 1):
        product = product * (sums[f"right{n}"] + _TINY) / (sums[f"all{n}"] + _SMALL)
        values[f"bleu-{n}"] = product ** (1 / n) * brevity
    return values
