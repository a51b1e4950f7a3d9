"""CIDEr-D: how much of what people agree on a caption says."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Accumulator, Measure
from paligemma_jax.evaluation.metrics.captions import (
    DEFAULT_TOKENIZER,
    FITS,
    Tokenizer,
    Words,
    read_captions,
)
from paligemma_jax.evaluation.metrics.ngrams import Ngram, count_ngrams
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import divide

_LONGEST = 4
_SIGMA = 6.0

_Vectors = list[dict[Ngram, float]]  # of each length of n-gram: its weight


class CIDEr(Accumulator):
    """`cider`, from 0 to 10: mean over pictures of CIDEr-D. Published tables give it times 100.

    For n = 1 to 4, n-grams of caption and reference are weighed by their count times log(pictures /
    pictures with that n-gram in a reference); the similarity is the cosine of the two vectors, with
    the caption's weight cut to the reference's in the product, times exp(-d^2 / 72), d being the
    difference of their lengths. It is averaged over n and over references, times 10. Weights of
    n-grams are those of the references of all examples together, so a part of a data set scores
    differently, and a single picture 0. `penalized=False` is CIDEr without the cut and the length
    penalty, on words that are not stemmed.

    A prediction is a string, a reference a list of at least one. `tokenizer` gives the words of a
    caption; see `ptb_tokenizer` for how the default differs from the Java one, and pass `str.split`
    for captions that are tokenized. Source: Vedantam et al. 2015; as in pycocoevalcap. For COCO,
    NoCaps, TextCaps, SciCap, Screen2Words, Widget Captioning and captions of videos, and with
    `ByGroup(CIDEr(), {"mean": None}, overall=False)` for XM3600 and COCO-35L by language.
    """

    fits = FITS

    def __init__(self, penalized: bool = True, tokenizer: Tokenizer = DEFAULT_TOKENIZER):
        super().__init__()
        self.penalized = penalized
        self.tokenizer = tokenizer

    def _row(self, prediction: Any, reference: Any) -> tuple[Words, list[Words]]:
        return read_captions(prediction, reference, self.tokenizer)

    def _measure(self, rows: Sequence[tuple[Words, list[Words]]]) -> Measure:
        scores = self._scores(rows)
        return lambda weights: {"cider": divide(weights @ scores, weights.sum(axis=1))}

    def _scores(self, rows: Sequence[tuple[Words, list[Words]]]) -> np.ndarray:
        counts = [(count_ngrams(words), list(map(count_ngrams, refs))) for words, refs in rows]
        pictures: Counter[Ngram] = Counter()
        for _, references in counts:
            pictures.update(set().union(*references))
        everything = math.log(len(rows))
        rarity = {ngram: everything - math.log(count) for ngram, count in pictures.items()}

        def vectors(count: Mapping[Ngram, int]) -> _Vectors:
            parts: _Vectors = [{} for _ in range(_LONGEST)]
            for ngram, times in count.items():
                parts[len(ngram) - 1][ngram] = times * rarity.get(ngram, everything)
            return parts

        scores = []
        for caption, references in counts:
            own = vectors(caption)
            values = [
                self._similarity(own, vectors(reference), _length(caption) - _length(reference))
                for reference in references
            ]
            scores.append(10 * float(np.mean(values)))
        return np.array(scores)

    def _similarity(self, own: _Vectors, other: _Vectors, difference: int) -> float:
        penalty = math.exp(-(difference**2) / (2 * _SIGMA**2)) if self.penalized else 1.0
        total = 0.0
        for first, second in zip(own, other, strict=True):
            common = first.keys() & second.keys()
            if self.penalized:
                product = sum(min(first[g], second[g]) * second[g] for g in sorted(common))
            else:
                product = sum(first[g] * second[g] for g in sorted(common))
            norms = _norm(first) * _norm(second)
            total += product / norms if norms else 0.0
        return penalty * total / _LONGEST


def cider(
    predictions: Examples[str],
    references: Examples[Sequence[str]],
    *,
    tokenizer: Tokenizer = DEFAULT_TOKENIZER,
) -> dict[str, float]:
    """`CIDEr` (CIDEr-D) of lists or mappings; raises DatasetError."""
    return CIDEr(tokenizer=tokenizer).add_all(predictions, references).result()


def _length(count: Mapping[Ngram, int]) -> int:
    """In bigrams: one less than in words, as the reference code has it."""
    return sum(times for ngram, times in count.items() if len(ngram) == 2)


def _norm(vector: Mapping[Ngram, float]) -> float:
    return math.sqrt(sum(weight**2 for weight in vector.values()))
