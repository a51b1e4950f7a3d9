"""Detection and segmentation text <-> objects.

An object is written `<locYYYY><locXXXX><locYYYY><locXXXX> label`, top left corner first, with 16
mask codes `<segNNN>` between box and label where there is a mask; objects are joined by ` ; `.
"""

import dataclasses
import enum
from collections.abc import Iterable

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.processing.assembly import CODES, Draft, assemble
from paligemma_jax.processing.lexing import lex_text


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
class Unused:
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
    unused: tuple[Unused, ...]


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
        tuple(Unused(text[start:end], start, reason) for start, end, reason in unused),
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
