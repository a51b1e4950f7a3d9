import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.processing.parsing import Box, format_boxes, parse_boxes, parse_detection

LABELS = st.text(
    st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"], blacklist_characters=";")
).map(str.strip)
PAIRS = st.tuples(st.integers(0, 1023), st.integers(0, 1023)).map(sorted)


@st.composite
def boxes(draw) -> Box:
    (y1, y2), (x1, x2) = draw(PAIRS), draw(PAIRS)
    return Box(draw(LABELS), y1 / 1023, x1 / 1023, y2 / 1023, x2 / 1023)


@given(st.lists(boxes(), max_size=4))
def test_parse_inverts_format(wanted):
    assert parse_detection(format_boxes(wanted)) == (wanted, "")


@given(st.text() | st.text("<loc0123>seg; \n", max_size=80))
def test_never_raises(text):
    parse_boxes(text)


def test_order_and_scale():
    box = Box("cat", 0.0, 0.25, 0.5, 1.0)
    assert format_boxes([box]) == "<loc0000><loc0256><loc0512><loc1023> cat"
    parsed = parse_boxes(format_boxes([box]))[0]
    assert (parsed.y1, parsed.x1, parsed.y2, parsed.x2) == (0, 256 / 1023, 512 / 1023, 1)


L = "<loc0001><loc0002><loc0003><loc0004>"


@pytest.mark.parametrize(
    "text, labels, leftover",
    [
        (f"{L} cat ; {L} dog", ["cat", "dog"], ""),
        (f"{L}cat;{L}dog ;", ["cat", "dog"], ""),
        (f"{L} {L} dog", ["", "dog"], ""),
        (f"{L}\n{L} dog\nbye", ["", "dog"], "bye"),
        (f"{L} o'clock (a/b), é", ["o'clock (a/b), é"], ""),
        (f"{L}{'<seg001>' * 16} cat", ["cat"], ""),
        (f"I see {L} cat", ["cat"], "I see"),
        ("no objects", [], "no objects"),
        ("", [], ""),
        (f"{L} cat ; <loc0001><loc0002><loc", ["cat"], "<loc0001><loc0002><loc"),
        (f"{L} cat ; <loc0009><loc0002><loc0003><loc0004> dog", ["cat"],
         "<loc0009><loc0002><loc0003><loc0004> dog"),
        (f"<loc0001><loc0002><loc0003><loc1024> cat ; {L} dog", ["dog"],
         "<loc0001><loc0002><loc0003><loc1024> cat"),
    ],
)  # fmt: skip
def test_lenient_parsing(text, labels, leftover):
    parsed = parse_detection(text)
    assert [box.label for box in parsed.boxes] == labels
    assert parsed.leftover == leftover


@pytest.mark.parametrize("label", ["a;b", "a\nb", " a", "<loc0001>", "<seg001>"])
def test_labels_that_would_not_come_back(label):
    with pytest.raises(InvalidPromptError, match="would not come back"):
        format_boxes([Box(label, 0, 0, 1, 1)])


@pytest.mark.parametrize(
    "corners", [(0.5, 0, 0.4, 1), (0, 0, 1, 1.1), (-0.1, 0, 1, 1), (0, 0, 200, 9)]
)
def test_corners_that_are_no_box(corners):
    with pytest.raises(InvalidPromptError, match="are no box"):
        format_boxes([Box("cat", *corners)])
