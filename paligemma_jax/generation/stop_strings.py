"""Texts at which an answer stops, wherever its tokens begin and end.

The text of an answer while its tokens come, without what a further token might still change.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.processing.tokenizer import Tokenizer

HALF_A_CHARACTER = "\ufffd"  # what bytes decode to that are no character, or none yet


@dataclasses.dataclass(frozen=True)
class Stop:
    """Where an answer stops.

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
    """An answer stops where its text holds one of `strings`, and is cut before it.

    Of several the one that is complete first counts, and of those complete at the same character
    the longest: what somebody finds who reads the answer character by character. Raises
    InvalidPromptError for no strings and for empty ones.
    """

    tokenizer: Tokenizer
    strings: Sequence[str]

    def __post_init__(self) -> None:
        strings = (self.strings,) if isinstance(self.strings, str) else tuple(self.strings)
        object.__setattr__(self, "strings", strings)
        if not strings or not all(strings):
            raise InvalidPromptError(
                f"The stop strings are {list(strings)}. At least one, and none that is empty, fit. "
                "Call for example StopStrings(tokenizer, ['.'])"
            )

    def find(self, tokens: Sequence[int] | np.ndarray) -> Stop | None:
        """The first stop in an answer's tokens so far, None if there is none.

        Further tokens do not change what is found.
        """
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
        return self.tokenizer.decode(tokens).rstrip(HALF_A_CHARACTER)


class TextSoFar:
    """Turns tokens of one answer into pieces of text that, joined, are the answer's whole text.

    Held back are bytes that are no whole character yet, and what may turn out to be the beginning
    of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: StopStrings | None = None):
        self._tokenizer = tokenizer
        self._stop = stop
        self._given = 0  # characters
        self.stopped = False

    def grow(self, tokens: Sequence[int] | np.ndarray, *, ended: bool = False) -> str:
        """What is new in the text of `tokens`, all of the answer so far; all of it if it `ended`.

        A stop string ends the answer too: then `stopped` is True and nothing more comes.
        """
        if self.stopped:
            return ""
        text = self._tokenizer.decode(tokens)
        found = None if self._stop is None else self._stop.find(tokens)
        if found is not None:
            self.stopped = True
            text = text[: found.characters]
        elif not ended:
            text = text.rstrip(HALF_A_CHARACTER)
            text = text[: len(text) - self._beginning_of_stop(text)]
        new, self._given = text[self._given :], max(self._given, len(text))
        return new

    def _beginning_of_stop(self, text: str) -> int:
        """Characters at the end of `text` with which a stop string begins."""
        strings = () if self._stop is None else self._stop.strings
        return max(
            (n for s in strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
