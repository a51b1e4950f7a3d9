"""Where the errors of a run lie: by answer given, by confidence, by length."""

import math
from collections.abc import Callable

from paligemma_jax.evaluation.benchmarks.benchmark import Answer
from paligemma_jax.evaluation.benchmarks.evaluate import Evaluation, right_answer

_BINS = 10
Bin = tuple[str, float, float, int]  # name, mean confidence or length, mean score, examples


def confusion(done: Evaluation) -> dict[str, dict[str, int]] | None:
    """How often each right answer (first key) was given each: None unless all are yes or no."""
    counts = {right: {given: 0 for given in ("yes", "no", "other")} for right in ("yes", "no")}
    for example in done.examples:
        right = str(right_answer(example)).strip().lower()
        if done.benchmark.answer is not Answer.TEXT or right not in counts:
            return None
        made = done.predictions[example.id]
        if made.error is None:
            given = made.text.strip().lower()
            counts[right][given if given in ("yes", "no") else "other"] += 1
    return counts


def by_confidence(done: Evaluation) -> list[Bin]:
    """Ten bins of the probability of the whole answer; empty where answers have none."""

    def probability(id: str | int) -> float | None:
        logprob = done.predictions[id].logprob
        return None if logprob is None else math.exp(min(0.0, logprob))

    bins = _gather(done, probability, lambda value: min(int(value * _BINS), _BINS - 1))
    return [(f"{b / _BINS:.1f}-{(b + 1) / _BINS:.1f}", v, s, n) for b, v, s, n in bins]


def by_length(done: Evaluation) -> list[Bin]:
    """By the number of words of the answer: 0, 1, 2, 3-4, 5-8, ...; boxes and masks are none."""
    text = {e.id for e in done.examples if (e.answer or done.benchmark.answer) is Answer.TEXT}

    def words(id: str | int) -> float | None:
        return None if id not in text else float(len(done.predictions[id].text.split()))

    bins = _gather(done, words, lambda n: 0 if n == 0 else 1 + math.ceil(math.log2(n)))
    names = {0: "0", 1: "1", 2: "2"}
    spans = {b: f"{2 ** (b - 2) + 1}-{2 ** (b - 1)}" for b, *_ in bins if b > 2}
    return [((names | spans)[b], value, score, count) for b, value, score, count in bins]


def _gather(
    done: Evaluation,
    value_of: Callable[[str | int], float | None],
    bin_of: Callable[[float], int],
) -> list[tuple[int, float, float, int]]:
    gathered: dict[int, list[tuple[float, float]]] = {}
    for id, score in done.metric.scores.items():
        value = value_of(id)
        if value is not None and math.isfinite(score):
            gathered.setdefault(bin_of(value), []).append((value, score))
    return [
        (place, sum(v for v, _ in rows) / len(rows), sum(s for _, s in rows) / len(rows), len(rows))
        for place, rows in sorted(gathered.items())
    ]
