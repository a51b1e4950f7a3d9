"""Texts at which a sequence stops, wherever its tokens begin and end; text of unfinished tokens."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from paligemma_jax.processing.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what bytes decode to that are no character, or none yet


@dataclasses.dataclass(frozen=True)
class Stop:
    """Where a sequence stops.

    Attributes:
      string: the stop string.
      characters: of the text before it.
      tokens: up to and including the one with which the string is complete.
    """

    string: str
    characters: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """A sequence stops where its text holds one of `strings`, and is cut before it.

    Of several the one that is complete first counts, and of those complete at the same character
    the longest: what somebody finds who reads the text character by character.
    """

    tokenizer: Tokenizer
    strings: Sequence[str]

    def find(self, tokens: Sequence[int] | np.ndarray) -> Stop | None:
        """The first stop in a sequence's tokens so far; further tokens do not change it."""
        text = self._text(tokens)
        ends = [
            (start + len(string), start, string)
            for string in self.strings
            if (start := text.find(string)) >= 0
        ]
        if not ends:
            return None
        end, start, string = min(ends)
        counts = range(1, len(tokens) + 1)
        count = bisect.bisect_left(counts, end, key=lambda n: len(self._text(tokens[:n])))
        return Stop(string, start, counts[count])

    def _text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """What is sure to be in the text: the last character may still lack bytes."""
        return self.tokenizer.decode(tokens).rstrip(INCOMPLETE)


class TextStream:
    """Turns tokens of one sequence into pieces of text that, joined, are its whole text.

    Held back are bytes that are no whole character yet, and what may turn out to be the beginning
    of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: StopStrings | None = None):
        self._tokenizer = tokenizer
        self._strings = () if stop is None else stop.strings
        self._given = 0  # characters

    def grow(self, tokens: Sequence[int] | np.ndarray) -> str:
        """What is new and certain in the text of `tokens`, all of an unfinished sequence so far."""
        text = self._tokenizer.decode(tokens).rstrip(INCOMPLETE)
        return self._new(text[: len(text) - self._beginning_of_stop(text)])

    def finish(self, text: str) -> str:
        """What is new in the whole text."""
        return self._new(text)

    def _new(self, text: str) -> str:
        new, self._given = text[self._given :], max(self._given, len(text))
        return new

    def _beginning_of_stop(self, text: str) -> int:
        """Characters at the end of `text` with which a stop string begins."""
        strings = self._strings
        return max(
            (n for s in strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
