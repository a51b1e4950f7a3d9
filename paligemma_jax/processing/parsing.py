"""Detection text <-> boxes.

A box is written `<locYYYY><locXXXX><locYYYY><locXXXX> label`, top left corner first; objects are
joined by ` ; `. A coordinate is round(1023 c) of a position c in [0, 1] and is read as value / 1023
as in big_vision's training data and evaluator. (Downstream parsers often divide by 1024, which is
0.1 % less.)
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple

from paligemma_jax.errors import InvalidPromptError

_BINS = 1023
_CORNERS = r"<loc(\d{4})>" * 4
_MASK = r"(?:<seg\d{3}>)*"
# A label ends at a semicolon, a line break or the next box.
_OBJECT = re.compile(_CORNERS + r"\s*" + _MASK + r"((?:(?!<loc\d{4}>)[^;\n])*)")


@dataclasses.dataclass(frozen=True)
class Box:
    """One object: corners as fractions of the picture's height and width, in [0, 1]."""

    label: str
    y1: float
    x1: float
    y2: float
    x2: float


class ParsedBoxes(NamedTuple):
    """`leftover` is the text that belongs to no valid box, such as a cut-off end."""

    boxes: list[Box]
    leftover: str


def parse_boxes(text: str) -> list[Box]:
    """All complete boxes in a model's answer, in its order; never raises."""
    return parse_detection(text).boxes


def parse_detection(text: str) -> ParsedBoxes:
    """Boxes and what is left of the answer without them; never raises.

    Labels may be missing (""), mask tokens are skipped, and a box whose corners are out of range or
    not in order (y1 <= y2, x1 <= x2) is left over.
    """
    boxes, leftover, end = [], [], 0
    for match in _OBJECT.finditer(text):
        y1, x1, y2, x2 = (int(value) / _BINS for value in match.groups()[:4])
        leftover.append(text[end : match.start()])
        end = match.end()
        if y1 <= y2 <= 1 and x1 <= x2 <= 1:
            boxes.append(Box(match[5].strip(), y1, x1, y2, x2))
        else:
            leftover.append(match[0])
    leftover.append(text[end:])
    return ParsedBoxes(boxes, " ".join("".join(leftover).replace(";", " ").split()))


def format_boxes(boxes: Iterable[Box]) -> str:
    """The text of `boxes`, inverse of `parse_boxes`; corners are rounded to 1/1023.

    Raises InvalidPromptError for corners outside [0, 1] or out of order, and labels that would not
    come back.
    """
    return " ; ".join(map(_format, boxes))


def _format(box: Box) -> str:
    corners = (box.y1, box.x1, box.y2, box.x2)
    if not (0 <= box.y1 <= box.y2 <= 1 and 0 <= box.x1 <= box.x2 <= 1):
        raise InvalidPromptError(
            f"The corners {corners} are no box. y1 <= y2 and x1 <= x2, all from 0 to 1, fit. "
            "Divide pixels by the height and width of the picture."
        )
    text = "".join(f"<loc{round(c * _BINS):04d}>" for c in corners) + f" {box.label}".rstrip()
    if parse_boxes(text)[0].label != box.label:
        raise InvalidPromptError(
            f"The label {box.label!r} would not come back from the text. Words without semicolon, "
            "line break, location tokens or outer spaces fit. Rename it."
        )
    return text
