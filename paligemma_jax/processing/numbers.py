"""Counts in a model's answers."""

import re

_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def parse_number(text: str) -> int | None:
    """The number that an answer is, in digits or as an English word; None for anything else."""
    word = text.strip().lower().rstrip(".")
    if word in _WORDS:
        return _WORDS.index(word)
    return int(word) if re.fullmatch(r"[0-9]{1,18}", word) else None
