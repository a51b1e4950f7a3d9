"""An answer cut into location tokens, mask tokens, breaks and words: what the parser reads."""

import enum
import re
from collections.abc import Iterator
from typing import NamedTuple

# A location is 0000..1023 and a mask code 000..127; anything else in angle brackets is words.
_MARK = re.compile(r"<loc(0[0-9]{3}|10[01][0-9]|102[0-3])>|<seg(0[0-9]{2}|1[01][0-9]|12[0-7])>")
_BREAK = re.compile(r"[;\n]")


class Kind(enum.Enum):
    """What an item of an answer is; a BREAK is a semicolon or the end of a line."""

    LOCATION = enum.auto()
    CODE = enum.auto()
    BREAK = enum.auto()
    WORDS = enum.auto()


class Item(NamedTuple):
    """`value` is the number of a location or code, else -1; [start, end) are characters."""

    kind: Kind
    value: int
    start: int
    end: int


def lex_text(text: str) -> Iterator[Item]:
    """Items of `text` in order; space around words belongs to no item."""
    end = 0
    for match in _MARK.finditer(text):
        yield from lex_words(text[end : match.start()], end)
        kind = Kind.LOCATION if match[1] else Kind.CODE
        yield Item(kind, int(match[1] or match[2]), match.start(), match.end())
        end = match.end()
    yield from lex_words(text[end:], end)


def lex_words(text: str, start: int) -> Iterator[Item]:
    """Items of `text`, which begins at character `start` and holds no location and no code."""
    end = 0
    for match in _BREAK.finditer(text):
        yield from _words(text[end : match.start()], start + end)
        end = match.end()
        yield Item(Kind.BREAK, -1, start + match.start(), start + end)
    yield from _words(text[end:], start + end)


def _words(text: str, start: int) -> Iterator[Item]:
    words = text.strip()
    if words:
        start += len(text) - len(text.lstrip())
        yield Item(Kind.WORDS, -1, start, start + len(words))
