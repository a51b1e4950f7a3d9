"""What to do with text that has more tokens than there is room for."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from paligemma_jax.errors import InvalidPromptError


@runtime_checkable
class Overflow(Protocol):
    """Policy for more tokens than fit."""

    def fit(self, tokens: Sequence[int], length: int) -> list[int]:
        """At most `length` of `tokens`."""
        ...


@dataclasses.dataclass(frozen=True)
class Refuse:
    """Raises InvalidPromptError; the default everywhere."""

    def fit(self, tokens: Sequence[int], length: int) -> list[int]:
        if len(tokens) > length:
            raise InvalidPromptError(
                f"The text has {len(tokens)} tokens (bos, newline, answer and eos included). At "
                f"most {length} fit. Shorten it, raise the length, or cut it knowingly with "
                "on_overflow=Truncate()."
            )
        return list(tokens)


@dataclasses.dataclass(frozen=True)
class Truncate:
    """Cuts from the right as big_vision does: long answers lose eos, long prompts the newline."""

    def fit(self, tokens: Sequence[int], length: int) -> list[int]:
        return list(tokens[:length])
