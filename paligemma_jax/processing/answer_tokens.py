"""The parser of answers on token ids: objects, and which tokens each of them was read from."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from paligemma_jax.processing.assembly import Draft, assemble
from paligemma_jax.processing.lexing import Item, Kind, lex_words
from paligemma_jax.processing.parsing import LocationScale, ParsedAnswer, answer_of
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES, Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ObjectTokens:
    """Places in an answer's tokens that one object was read from.

    `separators` are those between the object before and this one, such as " ;"; the first object
    has none. A token that holds the end of a label and a separator is in both.
    """

    locations: tuple[int, int, int, int]
    codes: tuple[int, ...]
    label: tuple[int, ...]
    separators: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TokenAnswer:
    """An answer, and the tokens of each of its objects in the same order."""

    answer: ParsedAnswer
    places: tuple[ObjectTokens, ...]


def parse_tokens(
    tokens: Sequence[int],
    tokenizer: Tokenizer,
    scale: LocationScale = LocationScale.BIG_VISION,
) -> TokenAnswer:
    """Reads token ids up to the first eos as `parse_answer` reads their text.

    Locations and codes are tokens of these kinds alone: a model that spells out "<loc0001>" letter
    by letter has given words. Raises InvalidPromptError for an id that the tokenizer does not know.
    """
    text, items, spans = _lex(tokens, tokenizer)
    drafts, unused = assemble(items)
    idle = [(start, end) for start, end, _ in unused]
    places, before = [], None
    for draft in drafts:
        places.append(_places(draft, before, spans, idle))
        before = draft.span[1]
    return TokenAnswer(answer_of(text, drafts, unused, scale), tuple(places))


def _places(
    draft: Draft, before: int | None, spans: dict[int, Span], idle: list[Span]
) -> ObjectTokens:
    """`before` is where the object before ended; None for the first."""

    def inside(start: int, end: int) -> tuple[int, ...]:
        return tuple(place for place, span in spans.items() if span[0] < end and start < span[1])

    y1, x1, y2, x2 = (inside(item.start, item.end)[0] for item in draft.locations)
    codes = tuple(inside(item.start, item.end)[0] for item in draft.codes)
    label = () if draft.label is None else inside(draft.label.start, draft.label.end)
    separators = () if before is None else inside(before, draft.span[0])
    words = {place for span in idle for place in inside(*span)}
    return ObjectTokens(
        (y1, x1, y2, x2), codes, label, tuple(place for place in separators if place not in words)
    )


def _lex(tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[Item], dict[int, Span]]:
    """Text, its items, and for each place in `tokens` its characters in the text."""
    text, items, spans = "", [], {}
    kept = list(
        itertools.takewhile(lambda place: tokens[place] != tokenizer.eos_id, range(len(tokens)))
    )
    silent = (tokenizer.pad_id, tokenizer.bos_id)  # these leave nothing in the text
    spoken = [place for place in kept if tokens[place] not in silent]
    for kind, run in itertools.groupby(spoken, key=lambda place: _kind(tokens[place], tokenizer)):
        places = list(run)
        words = tokenizer.decode([tokens[place] for place in places])
        marks = _spans([tokens[place] for place in places], words, len(text), tokenizer)
        spans.update(zip(places, marks, strict=True))
        if kind is Kind.WORDS:
            items += lex_words(words, len(text))
        else:
            first = tokenizer.loc_start if kind is Kind.LOCATION else tokenizer.seg_start
            items += [
                Item(kind, tokens[place] - first, *mark)
                for place, mark in zip(places, marks, strict=True)
            ]
        text += words
    return text, items, spans


def _kind(token: int, tokenizer: Tokenizer) -> Kind:
    if tokenizer.loc_start <= token < tokenizer.loc_start + len(LOC_PIECES):
        return Kind.LOCATION
    if tokenizer.seg_start <= token < tokenizer.seg_start + len(SEG_PIECES):
        return Kind.CODE
    return Kind.WORDS


def _spans(tokens: list[int], text: str, start: int, tokenizer: Tokenizer) -> list[Span]:
    """Characters of each of `tokens`, whose text is `text`, which begins at character `start`."""
    spans: list[Span] = []
    end = start
    for byte, run in itertools.groupby(tokens, key=lambda token: _is_byte(token, tokenizer)):
        pieces = list(run)
        if byte:  # the bytes of a character share it
            size = len(tokenizer.decode(pieces))
            spans += [(end, end + size)] * len(pieces)
            end += size
            continue
        for token in pieces:
            size = len(tokenizer.piece(token))
            spans.append((end, end + size))
            end += size
    # A piece that does not stand for its own characters (unknown): all share all of the text.
    return spans if end == start + len(text) else [(start, start + len(text))] * len(tokens)


def _is_byte(token: int, tokenizer: Tokenizer) -> bool:
    return _BYTE.fullmatch(tokenizer.piece(token)) is not None
