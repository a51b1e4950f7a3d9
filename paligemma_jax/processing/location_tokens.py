"""Detection and segmentation text <-> objects.

An object is written `<locYYYY><locXXXX><locYYYY><locXXXX> label`, top left corner first, with 16
mask codes `<segNNN>` between box and label where there is a mask; objects are joined by ` ; `.
Text and token ids are cut into items (locations, codes, breaks, words) that one parser groups.
"""

import dataclasses
import enum
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES, Tokenizer

CODES = 16  # of one mask
_CORNERS = 4
# A location is 0000..1023 and a mask code 000..127; anything else in angle brackets is words.
_TOKEN = re.compile(r"<loc(0[0-9]{3}|10[01][0-9]|102[0-3])>|<seg(0[0-9]{2}|1[01][0-9]|12[0-7])>")
_BREAK = re.compile(r"[;\n]")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

Span = tuple[int, int]  # first character and end


class LocationScale(enum.Enum):
    """What stands for the far edge of the image, by which the number of a location is divided.

    big_vision's training data is round(1023 c) of a position c in [0, 1], and its evaluator divides
    by 1023: a box that fills the image comes back as 0 to 1. supervision, the demo Space and most
    others divide by 1024, which reads every corner up to 0.1 % of the side too far left and up.
    """

    BIG_VISION = 1023
    SUPERVISION = 1024


@dataclasses.dataclass(frozen=True)
class Box:
    """One object: corners as fractions of the image's height and width, in [0, 1].

    `label` is "" where none is given; `codes` are the 16 numbers (0..127) of its mask, if it has
    one; `span` says at which characters of the answer it stands, and plays no part in equality.
    """

    label: str
    y1: float
    x1: float
    y2: float
    x2: float
    codes: tuple[int, ...] | None = None
    span: Span | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Unparsed:
    """Text that belongs to no object, the character where it starts, and why it is unparsed."""

    text: str
    start: int
    reason: str


@dataclasses.dataclass(frozen=True)
class ParsedAnswer:
    """What a model's answer says.

    Every character of `text` beyond white space and semicolons is in the span of an object or in
    `unparsed`; a part inside the span of an object (half a mask before its label) is in both.
    """

    text: str
    objects: tuple[Box, ...]
    unparsed: tuple[Unparsed, ...]


@dataclasses.dataclass(frozen=True)
class ObjectTokens:
    """Indices of an answer's tokens that one object was read from.

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
    tokens: tuple[ObjectTokens, ...]


def parse_answer(text: str, scale: LocationScale = LocationScale.BIG_VISION) -> ParsedAnswer:
    """All objects of a model's answer, in its order, and all that is none; never raises.

    A label may be missing and may hold any character but a semicolon, which ends it as do the end
    of the line and the next box. Mask codes may stand before or after the label. A box of fewer
    than four locations or with corners out of order (not y1 <= y2, x1 <= x2) is unparsed, with its
    label; so are fewer than 16 codes in a row, while their box is kept.
    """
    return _to_answer(text, *_group(_items_of_text(text)), scale)


def parse_tokens(
    tokens: Sequence[int],
    tokenizer: Tokenizer,
    scale: LocationScale = LocationScale.BIG_VISION,
) -> TokenAnswer:
    """Parses token ids up to the first eos as `parse_answer` parses their text.

    Locations and codes are tokens of these kinds alone: a model that spells out "<loc0001>" letter
    by letter has given words. Raises InvalidPromptError for an id that the tokenizer does not know.
    """
    text, items, spans = _items_of_tokens(tokens, tokenizer)
    objects, unparsed = _group(items)
    ignored = {index for start, end, _ in unparsed for index in _between(spans, start, end)}
    found, before = [], None
    for one in objects:
        separators = () if before is None else _between(spans, before, one.span[0])
        y1, x1, y2, x2 = (_between(spans, item.start, item.end)[0] for item in one.locations)
        found.append(
            ObjectTokens(
                (y1, x1, y2, x2),
                tuple(_between(spans, item.start, item.end)[0] for item in one.codes),
                () if one.label is None else _between(spans, one.label.start, one.label.end),
                tuple(index for index in separators if index not in ignored),
            )
        )
        before = one.span[1]
    return TokenAnswer(_to_answer(text, objects, unparsed, scale), tuple(found))


def format_answer(objects: Iterable[Box], scale: LocationScale = LocationScale.BIG_VISION) -> str:
    """The text of `objects`, for training or to compare: the inverse of `parse_answer`.

    Corners are rounded to the nearest location token. Raises InvalidPromptError for corners outside
    [0, 1], boxes without area, codes that are no mask, and labels that would not come back.
    """
    return " ; ".join(_format(box, scale) for box in objects)


def _format(box: Box, scale: LocationScale) -> str:
    corners = (box.y1, box.x1, box.y2, box.x2)
    if not (0 <= box.y1 < box.y2 <= 1 and 0 <= box.x1 < box.x2 <= 1):
        raise InvalidPromptError(
            f"Expected a box y1 < y2, x1 < x2 with corners from 0 to 1, got {corners}. Divide "
            "pixels by the height and width of the image."
        )
    codes = () if box.codes is None else box.codes
    if box.codes is not None and not (len(codes) == CODES and all(0 <= c < 128 for c in codes)):
        raise InvalidPromptError(
            f"Expected {CODES} mask codes from 0 to 127, got {tuple(codes)}. Make them with: "
            "codec.encode(crops)"
        )
    # With 1024 the far edge would be 1024, for which there is no token.
    text = "".join(f"<loc{min(round(c * scale.value), 1023):04d}>" for c in corners)
    text += "".join(f"<seg{code:03d}>" for code in codes) + f" {box.label}".rstrip()
    if [found.label for found in parse_answer(text).objects] != [box.label]:
        raise InvalidPromptError(
            "Expected a label without semicolon, line break, location tokens or outer spaces, got "
            f"{box.label!r}, which would not come back from the text."
        )
    return text


class _Kind(enum.Enum):
    LOCATION = enum.auto()
    CODE = enum.auto()
    BREAK = enum.auto()  # a semicolon or the end of a line
    WORDS = enum.auto()


class _Item(NamedTuple):
    """`value` is the number of a location or code, else -1; [start, end) are characters."""

    kind: _Kind
    value: int
    start: int
    end: int


_Rest = tuple[int, int, str]  # first character, end, reason why it is unparsed


@dataclasses.dataclass
class _Object:
    """An object while it is read: four locations, 16 codes or none, a label or none."""

    locations: list[_Item]
    codes: list[_Item] = dataclasses.field(default_factory=list)
    label: _Item | None = None
    rest: list[_Rest] = dataclasses.field(default_factory=list)

    @property
    def span(self) -> Span:
        """Characters from the first location to the end of the last part that is used."""
        label = [] if self.label is None else [self.label]
        parts = [*self.locations, *self.codes, *label]
        return parts[0].start, max(part.end for part in parts)

    def add(self, kind: _Kind, items: list[_Item]) -> None:
        """Adds a run of codes, or words."""
        if kind is _Kind.WORDS and self.label is None:
            self.label = items[0]
        elif kind is _Kind.WORDS:
            self.rest.append(_rest(items, "words outside of any object"))
        elif not self.codes and len(items) >= CODES:
            self.codes = items[:CODES]
            if len(items) > CODES:
                self.rest.append(_rest(items[CODES:], "mask codes beyond the first 16"))
        else:
            reason = "a second mask" if self.codes else "fewer than 16 mask codes"
            self.rest.append(_rest(items, reason))

    @property
    def problem(self) -> str | None:
        """Why this is no object; None if it is one."""
        if len(self.locations) < _CORNERS:
            return "fewer than four locations"
        y1, x1, y2, x2 = (item.value for item in self.locations)
        return None if y1 <= y2 and x1 <= x2 else "corners out of order"


def _group(items: Iterable[_Item]) -> tuple[list[_Object], list[_Rest]]:
    """Objects in their order, and all other characters that are items, in that order."""
    objects: list[_Object] = []
    unparsed: list[_Rest] = []
    current: _Object | None = None

    def close() -> None:
        if current is None:
            return
        if current.problem is None:
            objects.append(current)
            unparsed.extend(current.rest)
        else:
            start, end = current.span
            unparsed.append(
                (start, max([end, *[rest[1] for rest in current.rest]]), current.problem)
            )

    for kind, run in itertools.groupby(items, key=lambda item: item.kind):
        found = list(run)
        if kind is _Kind.LOCATION:
            for first in range(0, len(found), _CORNERS):
                close()
                current = _Object(found[first : first + _CORNERS])
        elif kind is _Kind.BREAK:
            close()
            current = None
        elif current is not None:
            current.add(kind, found)
        else:
            code = kind is _Kind.CODE
            reason = "a mask without a box" if code else "words outside of any object"
            unparsed.append(_rest(found, reason))
    close()
    return objects, sorted(unparsed)


def _rest(items: list[_Item], reason: str) -> _Rest:
    return items[0].start, items[-1].end, reason


def _to_answer(
    text: str, objects: list[_Object], unparsed: list[_Rest], scale: LocationScale
) -> ParsedAnswer:
    boxes = []
    for one in objects:
        y1, x1, y2, x2 = (item.value / scale.value for item in one.locations)
        label = "" if one.label is None else text[one.label.start : one.label.end]
        codes = tuple(item.value for item in one.codes) or None
        boxes.append(Box(label, y1, x1, y2, x2, codes, one.span))
    rest = (Unparsed(text[start:end], start, reason) for start, end, reason in unparsed)
    return ParsedAnswer(text, tuple(boxes), tuple(rest))


def _items_of_text(text: str) -> Iterator[_Item]:
    """Items in order; space around words belongs to no item."""
    end = 0
    for match in _TOKEN.finditer(text):
        yield from _items_of_words(text[end : match.start()], end)
        kind = _Kind.LOCATION if match[1] else _Kind.CODE
        yield _Item(kind, int(match[1] or match[2]), match.start(), match.end())
        end = match.end()
    yield from _items_of_words(text[end:], end)


def _items_of_words(text: str, start: int) -> Iterator[_Item]:
    """Words and breaks of `text`, which begins at character `start`."""
    end = 0
    for match in _BREAK.finditer(text):
        yield from _words(text[end : match.start()], start + end)
        end = match.end()
        yield _Item(_Kind.BREAK, -1, start + match.start(), start + end)
    yield from _words(text[end:], start + end)


def _words(text: str, start: int) -> Iterator[_Item]:
    words = text.strip()
    if words:
        start += len(text) - len(text.lstrip())
        yield _Item(_Kind.WORDS, -1, start, start + len(words))


def _items_of_tokens(
    tokens: Sequence[int], tokenizer: Tokenizer
) -> tuple[str, list[_Item], dict[int, Span]]:
    """Text, its items, and for each index of `tokens` its characters in the text."""
    text, items, spans = "", [], {}
    end = list(tokens).index(tokenizer.eos_id) if tokenizer.eos_id in tokens else len(tokens)
    silent = (tokenizer.pad_id, tokenizer.bos_id)  # these leave nothing in the text
    spoken = [index for index in range(end) if tokens[index] not in silent]
    for kind, run in itertools.groupby(spoken, key=lambda index: _kind(tokens[index], tokenizer)):
        indices = list(run)
        words = tokenizer.decode([tokens[index] for index in indices])
        own = _token_spans([tokens[index] for index in indices], words, len(text), tokenizer)
        spans.update(zip(indices, own, strict=True))
        if kind is _Kind.WORDS:
            items += _items_of_words(words, len(text))
        else:
            first = tokenizer.loc_start if kind is _Kind.LOCATION else tokenizer.seg_start
            items += [
                _Item(kind, tokens[index] - first, *span)
                for index, span in zip(indices, own, strict=True)
            ]
        text += words
    return text, items, spans


def _kind(token: int, tokenizer: Tokenizer) -> _Kind:
    if tokenizer.loc_start <= token < tokenizer.loc_start + len(LOC_PIECES):
        return _Kind.LOCATION
    if tokenizer.seg_start <= token < tokenizer.seg_start + len(SEG_PIECES):
        return _Kind.CODE
    return _Kind.WORDS


def _token_spans(tokens: list[int], text: str, start: int, tokenizer: Tokenizer) -> list[Span]:
    """Characters of each of `tokens`, whose text is `text`, which begins at character `start`."""
    spans: list[Span] = []
    end = start
    pieces = [tokenizer.piece(token) for token in tokens]
    is_byte = [_BYTE.fullmatch(piece) is not None for piece in pieces]
    for byte, run in itertools.groupby(range(len(tokens)), key=lambda index: is_byte[index]):
        indices = list(run)
        if byte:  # the bytes of a character share it
            size = len(tokenizer.decode([tokens[index] for index in indices]))
            spans += [(end, end + size)] * len(indices)
            end += size
            continue
        for index in indices:
            spans.append((end, end + len(pieces[index])))
            end += len(pieces[index])
    # A piece that does not stand for its own characters (unknown): all share all of the text.
    return spans if end == start + len(text) else [(start, start + len(text))] * len(tokens)


def _between(spans: dict[int, Span], start: int, end: int) -> tuple[int, ...]:
    """Indices of the tokens that have characters in [start, end)."""
    return tuple(index for index, span in spans.items() if span[0] < end and start < span[1])
