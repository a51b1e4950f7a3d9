"""METEOR of captions, as far as it goes without word lists."""

import dataclasses
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
from paligemma_jax.evaluation.metrics.english_stemmer import stem
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import Totals, TotalsAccumulator, divide

_ALPHA, _BETA, _GAMMA = 0.85, 0.2, 0.6
_EXACT, _STEM = 1.0, 0.6
_BEAM = 40


@dataclasses.dataclass(frozen=True)
class _Alignment:
    """Words matched so far; sorted, the best comes first."""

    matches: int = 0
    weight: float = 0.0
    chunks: int = 0
    distance: int = 0
    used: int = 0  # bit i: word i of the reference
    last: int = -2  # place of the reference that the word before was matched to

    @property
    def rank(self) -> tuple[float, ...]:
        return -self.matches, self.chunks, self.distance, -self.weight


class Meteor(TotalsAccumulator):
    """`meteor-exact-stem`, in 0..1: METEOR 1.5 of the words and stems alone.

    The words of a caption are matched to those of a reference, equal ones (weight 1) or ones of
    equal English stem (0.6): as many as can be, then in as few chunks of neighbours as can be. With
    P and R the weight of the matches by the words of caption and reference, the score is
    P R / (0.85 P + 0.15 R) times 1 - 0.6 (chunks / matches)^0.2; of several references the best
    counts. Over all captions it is made of the sums, as METEOR 1.5 does.

    This is not the METEOR of published tables, and lower: synonyms come from WordNet, paraphrases
    and the list of function words (which that one weighs less) from tables of the Java program,
    none of which are here. Compare it with itself only. A prediction is a string, a reference a
    list of at least one. Source: Denkowski and Lavie 2014.
    """

    fits = FITS
    main = "score"

    def __init__(self, tokenizer: Tokenizer = DEFAULT_TOKENIZER):
        super().__init__()
        self.tokenizer = tokenizer

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        words, references = read_captions(prediction, reference, self.tokenizer)
        rows = [_compare(words, one) for one in references]
        return max(rows, key=lambda row: row["score"])

    def _finish(self, totals: Totals) -> Values:
        return {"meteor-exact-stem": _score(totals.sums)}


def meteor(
    predictions: Examples[str],
    references: Examples[Sequence[str]],
    *,
    tokenizer: Tokenizer = DEFAULT_TOKENIZER,
) -> dict[str, float]:
    """`Meteor` of lists or mappings; raises DatasetError."""
    return Meteor(tokenizer).add_all(predictions, references).result()


def _compare(words: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    best = _align(words, reference)
    whole = best.chunks == 1 and best.matches == len(words) == len(reference)
    row = {
        "matches": float(best.matches),
        "weight": best.weight,
        "chunks": 0.0 if whole else float(best.chunks),
        "words": float(len(words)),
        "reference": float(len(reference)),
    }
    return row | {"score": float(_score({k: np.array([v]) for k, v in row.items()})[0])}


def _score(sums: Mapping[str, np.ndarray]) -> np.ndarray:
    precision = divide(sums["weight"], sums["words"], 0.0)
    recall = divide(sums["weight"], sums["reference"], 0.0)
    mean = divide(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall, 0.0)
    return mean * (1 - _GAMMA * divide(sums["chunks"], sums["matches"], 0.0) ** _BETA)


def _align(words: Sequence[str], reference: Sequence[str]) -> _Alignment:
    """The best of a beam, over the words of the caption from left to right."""
    stems = [stem(word) for word in reference]
    beam = [_Alignment()]
    for place, word in enumerate(words):
        fitting = [
            (i, _EXACT if word == other else _STEM)
            for i, other in enumerate(reference)
            if word == other or stem(word) == stems[i]
        ]
        grown = [dataclasses.replace(state, last=-2) for state in beam]
        for state in beam:
            for i, weight in fitting:
                if not state.used >> i & 1:
                    grown.append(
                        _Alignment(
                            state.matches + 1,
                            state.weight + weight,
                            state.chunks + (state.last + 1 != i),
                            state.distance + abs(i - place),
                            state.used | 1 << i,
                            i,
                        )
                    )
        # Of alignments that can go on alike, the best one is enough.
        best: dict[tuple[int, int], _Alignment] = {}
        for state in sorted(grown, key=lambda one: one.rank):
            best.setdefault((state.used, state.last), state)
        beam = list(best.values())[:_BEAM]
    return min(beam, key=lambda one: one.rank)
