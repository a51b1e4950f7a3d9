"""The text of an answer while its tokens come, without what a further token might still change."""

from collections.abc import Sequence

import numpy as np

from paligemma_jax.generation.stopping import HALF_A_CHARACTER, StopStrings
from paligemma_jax.processing.tokenizer import Tokenizer


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
