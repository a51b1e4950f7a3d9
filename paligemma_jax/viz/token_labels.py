"""Tokens as words in a picture or a terminal."""

import unicodedata
from collections.abc import Iterable

from paligemma_jax.processing.tokenizer import Tokenizer


def token_labels(tokenizer: Tokenizer, tokens: Iterable[int]) -> tuple[str, ...]:
    """Each piece as SentencePiece spells it (a space is U+2581), newlines and the like escaped."""
    return tuple(_visible(tokenizer.piece(int(token))) for token in tokens)


def cells_wide(text: str) -> int:
    """Columns that `text` takes in a terminal: two for East Asian wide characters."""
    return sum(map(_width, text))


def cut(text: str, width: int) -> str:
    """`text`, or as much of its beginning as fits `width` columns with an ellipsis."""
    if cells_wide(text) <= width:
        return text
    kept = ""
    for character in text:
        if cells_wide(kept + character) > width - 1:
            break
        kept += character
    return f"{kept}…"


def _visible(piece: str) -> str:
    return "".join(c if _is_visible(c) else c.encode("unicode_escape").decode() for c in piece)


def _is_visible(character: str) -> bool:
    # Z: spaces and line ends; C: control, formatting (direction marks), unassigned; M: combining.
    return unicodedata.category(character)[0] not in "ZCM"


def _width(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
