"""Answers to objects and back: nothing is lost, nothing fails."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.processing.location_tokens import (
    Box,
    LocationScale,
    ParsedAnswer,
    format_answer,
    parse_answer,
)

LABELS = st.text(
    st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"], blacklist_characters=";")
).map(str.strip)
PAIRS = st.lists(st.integers(0, 1023), min_size=2, max_size=2, unique=True).map(sorted)
CODES = st.none() | st.lists(st.integers(0, 127), min_size=16, max_size=16).map(tuple)
MARKS = [
    "<loc0000>",
    "<loc0500>",
    "<loc1023>",
    "<loc1024>",
    "<seg000>",
    "<seg128>",
    "<seg127>" * 16,
]
PIECES = [*MARKS, "<loc0001><loc0002><loc0003><loc0004>", "<loc", ";", " ; ", "\n", " ", "cat", "é"]
# Marks in any order, between words and breaks, and cut anywhere.
ANSWERS = st.builds(
    lambda pieces, cut: "".join(pieces)[cut:], st.lists(st.sampled_from(PIECES)), st.integers(0, 9)
)


@st.composite
def boxes(draw, scale: int = 1023) -> Box:
    (y1, y2), (x1, x2) = draw(PAIRS), draw(PAIRS)
    return Box(draw(LABELS), y1 / scale, x1 / scale, y2 / scale, x2 / scale, draw(CODES))


@given(st.lists(boxes(), max_size=4))
def test_parse_inverts_format(wanted: list[Box]):
    text = format_answer(wanted)
    assert parse_answer(text) == ParsedAnswer(text, tuple(wanted), ())


@given(st.lists(boxes(1024), max_size=3))
def test_parse_inverts_format_at_the_other_scale(wanted: list[Box]):
    scale = LocationScale.SUPERVISION
    assert parse_answer(format_answer(wanted, scale), scale).objects == tuple(wanted)


@given(st.text() | st.text("<loc0123>seg; \n", max_size=80) | ANSWERS)
def test_every_character_is_used_or_listed(text: str):
    parsed = parse_answer(text)
    starts = [part.start for part in parsed.unparsed]
    assert starts == sorted(starts)
    left = list(text)
    for part in parsed.unparsed:
        end = part.start + len(part.text)
        assert part.text and text[part.start : end] == part.text
        assert all(left[part.start : end])  # no character is listed twice
        left[part.start : end] = [""] * len(part.text)
    places = []
    for found in parsed.objects:
        assert found.span is not None
        places += range(*found.span)
        # What is not listed of an object's text is the object, all of it and nothing else.
        kept = "".join(left[slice(*found.span)])
        again = parse_answer(kept)
        assert again.objects == (found,) and not again.unparsed
        left[slice(*found.span)] = [""] * (found.span[1] - found.span[0])
    assert len(places) == len(set(places))
    assert not "".join(left).replace(";", "").strip()


def test_order_and_scale():
    box = Box("cat", 0.0, 0.25, 0.5, 1.0)
    assert format_answer([box]) == "<loc0000><loc0256><loc0512><loc1023> cat"
    parsed = parse_answer(format_answer([box])).objects[0]
    assert (parsed.y1, parsed.x1, parsed.y2, parsed.x2) == (0, 256 / 1023, 512 / 1023, 1)
    assert format_answer([box], LocationScale.SUPERVISION).endswith("<loc1023> cat")


L = "<loc0001><loc0002><loc0003><loc0004>"
M = "".join(f"<seg{code:03d}>" for code in range(16))
CODES_OF_M = tuple(range(16))


@pytest.mark.parametrize(
    "text, labels, unparsed",
    [
        (f"{L} cat ; {L} dog", ["cat", "dog"], []),
        (f"{L}cat;{L}dog ;", ["cat", "dog"], []),
        (f"{L} {L} dog", ["", "dog"], []),
        (f"{L}\n{L} dog\nbye", ["", "dog"], ["bye"]),
        (f"{L} o'clock (a/b), é", ["o'clock (a/b), é"], []),
        (f"{L} 5 < 6 <b>", ["5 < 6 <b>"], []),
        (f"I see {L} cat", ["cat"], ["I see"]),
        ("no objects", [], ["no objects"]),
        ("", [], []),
        (f"{L} cat ; <loc0001><loc0002><loc", ["cat"], ["<loc0001><loc0002><loc"]),
        (f"{L} cat ; <loc0009><loc0002><loc0003><loc0004> dog", ["cat"],
         ["<loc0009><loc0002><loc0003><loc0004> dog"]),
        (f"<loc0001><loc0002><loc0003><loc1024> cat ; {L} dog", ["dog"],
         ["<loc0001><loc0002><loc0003><loc1024> cat"]),
        (f"<loc٠٠٠١>{L}", [""], ["<loc٠٠٠١>"]),
    ],
)  # fmt: skip
def test_boxes(text: str, labels: list[str], unparsed: list[str]):
    parsed = parse_answer(text)
    assert [box.label for box in parsed.objects] == labels
    assert [piece.text for piece in parsed.unparsed] == unparsed
    assert all(box.codes is None for box in parsed.objects)


@pytest.mark.parametrize(
    "text, label, codes, unparsed",
    [
        (f"{L}{M} cat", "cat", True, []),
        (f"{L} {M}", "", True, []),
        (f"{L} cat {M}", "cat", True, []),
        (f"{L} {M[:-8]} cat", "cat", False, [M[:-8]]),
        (f"{L} {M}{M} cat", "cat", True, [M]),
        (f"{L} {M} cat <seg001> dog", "cat", True, ["<seg001>", "dog"]),
        (f"{M}{L} cat", "cat", False, [M]),
    ],
)
def test_masks(text: str, label: str, codes: bool, unparsed: list[str]):
    parsed = parse_answer(text)
    (box,) = parsed.objects
    assert box.label == label and box.codes == (CODES_OF_M if codes else None)
    assert [piece.text for piece in parsed.unparsed] == unparsed


def test_places_and_reasons():
    text = f"Here: {L}<seg001> red cat ; <loc0005> dog"
    parsed = parse_answer(text)
    span = parsed.objects[0].span
    assert span and text[slice(*span)] == f"{L}<seg001> red cat"
    assert [(piece.start, piece.reason) for piece in parsed.unparsed] == [
        (0, "words outside of any object"),
        (6 + 36, "fewer than 16 mask codes"),
        (text.index("<loc0005>"), "fewer than four locations"),
    ]


@pytest.mark.parametrize("label", ["a;b", "a\nb", " a", "<loc0001>", "<seg001>", M, f"{M} a"])
def test_labels_that_would_not_come_back(label: str):
    with pytest.raises(InvalidPromptError, match="would not come back"):
        format_answer([Box(label, 0, 0, 1, 1)])


@pytest.mark.parametrize(
    "corners",
    [(0.5, 0, 0.4, 1), (0, 0, 1, 1.1), (-0.1, 0, 1, 1), (0, 0, 200, 9), (0, 0.2, 1, 0.2),
     (0, 0, float("nan"), 1)],
)  # fmt: skip
def test_corners_that_are_no_box(corners: tuple[float, float, float, float]):
    with pytest.raises(InvalidPromptError, match="corners from 0 to 1"):
        format_answer([Box("cat", *corners)])


@pytest.mark.parametrize("codes", [(), (1,) * 15, (1,) * 17, (128,) * 16, (-1,) * 16])
def test_codes_that_are_no_mask(codes: tuple[int, ...]):
    with pytest.raises(InvalidPromptError, match="16 mask codes"):
        format_answer([Box("cat", 0, 0, 1, 1, codes)])
