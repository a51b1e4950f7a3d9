"""Detection and segmentation text <-> objects.

An object is written `<locYYYY><locXXXX><locYYYY><locXXXX> label`, top left corner first, with 16
mask codes `<segNNN>` between box and label where there is a mask; objects are joined by ` ; `.

An answer cut into location tokens, mask tokens, breaks and words: what the parser reads.

Items of an answer put together to objects; what fits nowhere is kept with its reason.

Answers read exactly as supervision, the demo Space and big_vision's evaluator read them.

For results that must equal theirs. They drop what they do not understand; `parse_answer` does not.
Facts: supervision 0.31.2 `from_vlm(VLM.PALIGEMMA)`; huggingface.co/spaces/big-vision/paligemma
`extract_objs`; big_vision `evaluators/proj/paligemma/transfers/segmentation.py`.

The parser of answers on token ids: objects, and which tokens each of them was read from.
"""

import dataclasses
import enum
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from PIL import Image

from paligemma_jax.errors import InvalidImageError, InvalidPromptError
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES, Tokenizer

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


CODES = 16  # of one mask
_CORNERS = 4

Rest = tuple[int, int, str]  # first character, end, reason


@dataclasses.dataclass
class Draft:
    """An object while it is read: four locations, 16 codes or none, a label or none."""

    locations: list[Item]
    codes: list[Item] = dataclasses.field(default_factory=list)
    label: Item | None = None
    rest: list[Rest] = dataclasses.field(default_factory=list)

    @property
    def span(self) -> tuple[int, int]:
        """Characters from the first location to the end of the last part that is used."""
        label = [] if self.label is None else [self.label]
        parts = [*self.locations, *self.codes, *label]
        return parts[0].start, max(part.end for part in parts)

    def take(self, kind: Kind, items: list[Item]) -> None:
        """Adds a run of codes, or words."""
        if kind is Kind.WORDS and self.label is None:
            self.label = items[0]
        elif kind is Kind.CODE and not self.codes and len(items) >= CODES:
            self.codes = items[:CODES]
            if len(items) > CODES:
                self.rest.append(_rest(items[CODES:], "mask codes beyond the first 16"))
        elif kind is Kind.CODE:
            reason = "a second mask" if self.codes else "fewer than 16 mask codes"
            self.rest.append(_rest(items, reason))
        else:
            self.rest.append(_rest(items, "words outside of any object"))

    @property
    def fault(self) -> str | None:
        """Why this is no object; None if it is one."""
        if len(self.locations) < _CORNERS:
            return "fewer than four locations"
        y1, x1, y2, x2 = (item.value for item in self.locations)
        return None if y1 <= y2 and x1 <= x2 else "corners out of order"


def assemble(items: Iterable[Item]) -> tuple[list[Draft], list[Rest]]:
    """Objects in their order, and all other characters that are items, in that order."""
    drafts: list[Draft] = []
    unused: list[Rest] = []
    open_draft: Draft | None = None

    def close() -> None:
        if open_draft is None:
            return
        fault = open_draft.fault
        if fault is None:
            drafts.append(open_draft)
            unused.extend(open_draft.rest)
        else:
            start, end = open_draft.span
            end = max([end, *[rest[1] for rest in open_draft.rest]])
            unused.append((start, end, fault))

    for kind, run in groupby(items, key=lambda item: item.kind):
        found = list(run)
        if kind is Kind.LOCATION:
            for first in range(0, len(found), _CORNERS):
                close()
                open_draft = Draft(found[first : first + _CORNERS])
        elif kind is Kind.BREAK:
            close()
            open_draft = None
        elif open_draft is not None:
            open_draft.take(kind, found)
        elif kind is Kind.CODE:
            unused.append(_rest(found, "a mask without a box"))
        else:
            unused.append(_rest(found, "words outside of any object"))
    close()
    return drafts, sorted(unused)


def _rest(items: list[Item], reason: str) -> Rest:
    return items[0].start, items[-1].end, reason


class LocationScale(enum.Enum):
    """What stands for the far edge of the picture, by which the number of a location is divided.

    big_vision's training data is round(1023 c) of a position c in [0, 1], and its evaluator divides
    by 1023: a box that fills the picture comes back as 0 to 1. supervision, the demo Space and most
    others divide by 1024, which reads every corner up to 0.1 % of the side too far left and up.
    """

    BIG_VISION = 1023
    SUPERVISION = 1024


@dataclasses.dataclass(frozen=True)
class Box:
    """One object: corners as fractions of the picture's height and width, in [0, 1].

    `label` is "" where none is given; `codes` are the 16 numbers (0..127) of its mask, if it has
    one; `span` says at which characters of the answer it stands, and plays no part in equality.
    """

    label: str
    y1: float
    x1: float
    y2: float
    x2: float
    codes: tuple[int, ...] | None = None
    span: tuple[int, int] | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Unparsed:
    """Text that belongs to no object, the character where it starts, and why it is unused."""

    text: str
    start: int
    reason: str


@dataclasses.dataclass(frozen=True)
class ParsedAnswer:
    """What a model's answer says.

    Every character of `text` beyond white space and semicolons is in the span of an object or in
    `unused`; a piece inside the span of an object (half a mask before its label) is in both.
    """

    text: str
    objects: tuple[Box, ...]
    unused: tuple[Unparsed, ...]


def parse_answer(text: str, scale: LocationScale = LocationScale.BIG_VISION) -> ParsedAnswer:
    """All objects of a model's answer, in its order, and all that is none; never raises.

    A label may be missing and may hold any character but a semicolon, which ends it as do the end
    of the line and the next box. Mask codes may stand before or after the label. A box of fewer
    than four locations or with corners out of order (y1 <= y2, x1 <= x2 fit) is unused, with its
    label; so are fewer than 16 codes in a row, while their box is kept.
    """
    drafts, unused = assemble(lex_text(text))
    return answer_of(text, drafts, unused, scale)


def answer_of(
    text: str,
    drafts: Iterable[Draft],
    unused: Iterable[tuple[int, int, str]],
    scale: LocationScale,
) -> ParsedAnswer:
    """The typed answer of assembled drafts and of (start, end, reason) of unused characters."""
    return ParsedAnswer(
        text,
        tuple(_box(text, draft, scale) for draft in drafts),
        tuple(Unparsed(text[start:end], start, reason) for start, end, reason in unused),
    )


def format_answer(objects: Iterable[Box], scale: LocationScale = LocationScale.BIG_VISION) -> str:
    """The text of `objects`, for training or to compare: the inverse of `parse_answer`.

    Corners are rounded to the nearest location token. Raises InvalidPromptError for corners outside
    [0, 1], boxes without area, codes that are no mask, and labels that would not come back.
    """
    return " ; ".join(_format(box, scale) for box in objects)


def _box(text: str, draft: Draft, scale: LocationScale) -> Box:
    y1, x1, y2, x2 = (item.value / scale.value for item in draft.locations)
    label = "" if draft.label is None else text[draft.label.start : draft.label.end]
    codes = tuple(item.value for item in draft.codes) or None
    return Box(label, y1, x1, y2, x2, codes, draft.span)


def _format(box: Box, scale: LocationScale) -> str:
    corners = (box.y1, box.x1, box.y2, box.x2)
    if not (0 <= box.y1 < box.y2 <= 1 and 0 <= box.x1 < box.x2 <= 1):
        raise InvalidPromptError(
            f"The corners {corners} are no box. y1 < y2 and x1 < x2, all from 0 to 1, fit. "
            "Divide pixels by the height and width of the picture."
        )
    codes = () if box.codes is None else box.codes
    if box.codes is not None and (
        len(codes) != CODES or not all(0 <= code < 128 for code in codes)
    ):
        raise InvalidPromptError(
            f"The codes {tuple(codes)} are no mask. {CODES} numbers from 0 to 127 fit. Make them "
            "with: codec.encode(crops)"
        )
    # With 1024 the far edge would be 1024, for which there is no token.
    text = "".join(f"<loc{min(round(c * scale.value), 1023):04d}>" for c in corners)
    text += "".join(f"<seg{code:03d}>" for code in codes) + f" {box.label}".rstrip()
    if [found.label for found in parse_answer(text).objects] != [box.label]:
        raise InvalidPromptError(
            f"The label {box.label!r} would not come back from the text. Words without semicolon, "
            "line break, location tokens or outer spaces fit. Rename it."
        )
    return text


_LOCATION = r"<loc(\d{4})>"
_SUPERVISION = re.compile(rf"(?<!<loc\d{{4}}>){_LOCATION * 4} ([\w\s\-]+)")
_CODE = r"<seg(\d{3})>"
_SPACE = re.compile(rf"(.*?){_LOCATION * 4}\s*(?:{_CODE * 16})?\s*([^;<>]+)? ?(?:; )?")
_OBJECT_TOKENS = 20  # four locations and 16 codes


@dataclasses.dataclass(frozen=True, eq=False)
class SupervisionBoxes:
    """xyxy f64[n, 4] in pixels, class_id i64[n] or None, class_name str[n]."""

    xyxy: np.ndarray
    class_id: np.ndarray | None
    class_name: np.ndarray


def parse_supervision(
    text: str, width: int, height: int, classes: Sequence[str] | None = None
) -> SupervisionBoxes:
    """What `supervision.Detections.from_vlm` finds: locations / 1024, no masks.

    Corners the wrong way round are put right. A label is one space and then letters, digits,
    spaces, `_` and `-`: it is cut at anything else, and without one the box is not found. `classes`
    drops other labels and gives the rest numbers. Raises InvalidImageError for a size that is not
    positive.
    """
    if not (width > 0 and height > 0):
        raise InvalidImageError(
            f"A picture of {width} x {height} pixels cannot be. Positive sizes fit. Pass those of "
            "the picture: *image.size"
        )
    found = _SUPERVISION.findall(text)
    if not found:
        return SupervisionBoxes(np.empty((0, 4)), np.empty(0, int), np.empty(0, str))
    corners = np.array([[int(value) for value in match[:4]] for match in found])
    corners = corners[:, [1, 0, 3, 2]] / 1024 * np.array([width, height, width, height])
    xyxy = np.sort(corners.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    names = np.array([match[4].strip() for match in found])
    if classes is None:
        return SupervisionBoxes(xyxy, None, names)
    kept = np.array([name in classes for name in names], bool)
    numbers = [list(classes).index(name) for name in names[kept]]
    return SupervisionBoxes(xyxy[kept], np.array(numbers, int), names[kept])


@dataclasses.dataclass(frozen=True)
class SpacePart:
    """A stretch of an answer; other text than objects has `content` alone.

    xyxy are whole pixels; `name` keeps the space before a separator; codes are 16 or None.
    """

    content: str
    xyxy: tuple[int, int, int, int] | None = None
    codes: tuple[int, ...] | None = None
    name: str | None = None


def parse_space(
    text: str, width: int, height: int, *, unique_labels: bool = False
) -> list[SpacePart]:
    """What the demo Space's `extract_objs` finds: locations / 1024, rounded to pixels.

    `unique_labels` appends ' to a name until it is new. Masks are `paste_space` of decoded codes.
    """
    parts: list[SpacePart] = []
    seen: set[str | None] = set()
    while text:
        match = _SPACE.match(text)
        if match is None:
            break
        before, name = match[1], match[22]
        y1, x1, y2, x2 = (int(value) / 1024 for value in match.groups()[1:5])
        xyxy = (round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height))
        codes = None if match[6] is None else tuple(int(code) for code in match.groups()[5:21])
        if before:
            parts.append(SpacePart(before))
        while unique_labels and name in seen:
            name = (name or "") + "'"
        seen.add(name)
        parts.append(SpacePart(match[0][len(before) :], xyxy, codes, name))
        text = text[match.end() :]
    return [*parts, SpacePart(text)] if text else parts


def paste_space(
    mask: np.ndarray, xyxy: tuple[int, int, int, int], height: int, width: int
) -> np.ndarray:
    """The Space's soft mask f64[height, width] of a decoded one f32[64, 64] in 0..1."""
    x1, y1, x2, y2 = xyxy
    pasted = np.zeros((height, width))
    if y2 > y1 and x2 > x1:
        # Pillow's default for "L", as there: bicubic.
        small = Image.fromarray((np.clip(mask, 0, 1) * 255).astype(np.uint8))
        pasted[y1:y2, x1:x2] = np.array(small.resize((x2 - x1, y2 - y1))) / 255.0
    return pasted


@dataclasses.dataclass(frozen=True)
class BigVisionObject:
    """Corners y1, x1, y2, x2 in 0..1 and 16 codes; all zero where the answer is not valid."""

    corners: tuple[float, ...]
    codes: tuple[int, ...]
    valid: bool


def parse_big_vision(tokens: Sequence[int], loc_start: int, seg_start: int) -> BigVisionObject:
    """What big_vision's segmentation evaluator takes from an answer: its first 20 tokens.

    They are valid if four are locations (/ 1023) with y1 < y2 and x1 < x2, and 16 mask codes; the
    rest of the answer is not looked at.
    """
    locations = [token - loc_start for token in tokens[:4]]
    codes = [token - seg_start for token in tokens[4:_OBJECT_TOKENS]]
    valid = (
        len(tokens) >= _OBJECT_TOKENS
        and all(0 <= location < 1024 for location in locations)
        and all(0 <= code < 128 for code in codes)
        and locations[2] > locations[0]
        and locations[3] > locations[1]
    )
    if not valid:
        return BigVisionObject((0.0,) * 4, (0,) * 16, False)
    return BigVisionObject(tuple(value / 1023 for value in locations), tuple(codes), True)


def paste_big_vision(
    mask: np.ndarray, corners: Sequence[float], height: int, width: int
) -> np.ndarray:
    """The evaluator's bool[height, width] of a decoded mask f32[64, 64] in -1..1, not clipped.

    Pixels of the box are cut off, not rounded; the mask is resized bilinearly and is where it
    is above 0.
    """
    y1, x1, y2, x2 = (
        int(corner * side)
        for corner, side in zip(corners, (height, width, height, width), strict=True)
    )
    pasted = np.zeros((height, width), bool)
    if y2 > y1 and x2 > x1:
        small = Image.fromarray(np.asarray(mask, np.float32))
        resized = small.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
        pasted[y1:y2, x1:x2] = np.asarray(resized) > 0
    return pasted


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
