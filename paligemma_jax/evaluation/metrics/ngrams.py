"""Runs of words."""

from collections import Counter
from collections.abc import Sequence

Ngram = tuple[str, ...]


def count_ngrams(words: Sequence[str], most: int = 4) -> Counter[Ngram]:
    """How often each run of 1 to `most` words comes."""
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, most + 1)
        for start in range(len(words) - length + 1)
    )
