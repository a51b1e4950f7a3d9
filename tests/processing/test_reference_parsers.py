"""The rules of three other readers, on what tells them apart."""

import numpy as np
import pytest
from hypothesis import given, settings

from paligemma_jax.errors import InvalidImageError
from paligemma_jax.processing.reference_parsers import (
    SpacePart,
    parse_big_vision,
    parse_space,
    parse_supervision,
    paste_big_vision,
    paste_space,
)
from tests.processing.test_parsing import ANSWERS

L = "<loc0128><loc0256><loc0512><loc1023>"
M = "".join(f"<seg{code:03d}>" for code in range(16))


@pytest.mark.parametrize(
    "text, names",
    [
        (f"{L} red cat ; {L} dog", ["red cat", "dog"]),
        (f"{L} o'clock", ["o"]),
        (f"{L}cat", []),
        (f"{L}{M} cat", []),
        (f"<loc0001>{L} cat", []),
        (f"{L} cat\ndog", ["cat\ndog"]),
        ("<loc0512><loc0256><loc0128><loc1023> upside down", ["upside down"]),
        ("", []),
    ],
)
def test_supervision_rule(text: str, names: list[str]):
    found = parse_supervision(text, 100, 200)
    assert found.class_name.tolist() == names
    for xyxy in found.xyxy:
        np.testing.assert_allclose(xyxy, [25, 25, 100 * 1023 / 1024, 100])


@pytest.mark.parity
@settings(deadline=None)  # the first example imports supervision
@given(ANSWERS)
def test_supervision_itself_says_the_same(text: str):
    sv = pytest.importorskip("supervision")
    text = text.replace(">cat", "> cat")
    for classes in (None, ["é", "cat"]):
        theirs = sv.Detections.from_vlm(
            sv.VLM.PALIGEMMA, text, resolution_wh=(37, 91), classes=classes
        )
        ours = parse_supervision(text, 37, 91, classes)
        np.testing.assert_array_equal(ours.xyxy, theirs.xyxy)
        np.testing.assert_array_equal(ours.class_name, theirs.data["class_name"])
        assert (ours.class_id is None) == (theirs.class_id is None)
        if ours.class_id is not None:
            np.testing.assert_array_equal(ours.class_id, theirs.class_id)


def test_supervision_needs_a_size():
    with pytest.raises(InvalidImageError, match="0 x 5"):
        parse_supervision("", 0, 5)


def test_space_rule():
    text = f"look: {L} {M} cat ; {L}cat ; {L} ; bye"
    box = (25, 25, 100, 100)
    assert parse_space(text, 100, 200) == [
        SpacePart("look: "),
        SpacePart(f"{L} {M} cat ; ", box, tuple(range(16)), "cat "),
        SpacePart(f"{L}cat ; ", box, None, "cat "),
        SpacePart(f"{L} ; ", box, None, None),
        SpacePart("bye"),
    ]
    names = [part.name for part in parse_space(text, 100, 200, unique_labels=True)]
    assert names == [None, "cat ", "cat '", None, None]


def test_space_stops_at_a_line_break_before_a_box():
    assert parse_space(f"a\n{L} cat", 9, 9) == [SpacePart(f"a\n{L} cat")]


@given(ANSWERS)
def test_space_never_fails_and_keeps_all_text(text: str):
    assert "".join(part.content for part in parse_space(text, 10, 10)) == text


LOC, SEG = 1000, 3000
VALID = [LOC + 1, LOC + 2, LOC + 3, LOC + 1023, *range(SEG, SEG + 16)]


def test_big_vision_reads_the_first_twenty_tokens():
    found = parse_big_vision([*VALID, 7, LOC], LOC, SEG)
    assert found.valid and found.codes == tuple(range(16))
    assert found.corners == (1 / 1023, 2 / 1023, 3 / 1023, 1.0)


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        VALID[:19],
        [5, *VALID],
        [LOC + 3, *VALID[1:]],  # no height
        [VALID[0], LOC + 1023, *VALID[2:]],
        [*VALID[:3], LOC + 1024, *VALID[4:]],
        [*VALID[:19], SEG + 128],
    ],
)
def test_big_vision_refuses(tokens: list[int]):
    found = parse_big_vision(tokens, LOC, SEG)
    assert not found.valid and not any(found.corners) and not any(found.codes)


def test_pasted_masks():
    left = np.where(np.arange(64) < 32, 1.0, -1.0) * np.ones((64, 1))
    hard = paste_big_vision(left, (0.25, 0.1, 0.99, 0.99), 10, 20)
    assert hard.sum() == 7 * 8 or hard.sum() == 7 * 9
    assert hard[2:9, 2:10].all() and not hard[:2].any() and not hard[9:].any()
    assert not paste_big_vision(left, (0.0, 0.0, 0.0, 1.0), 10, 20).any()
    soft = paste_space(left * 0.5 + 0.5, (2, 2, 10, 9), 10, 20)
    assert soft[4, 2] == 1 and soft[4, 9] == 0 and not soft[9:].any()
    assert not paste_space(left, (2, 2, 2, 9), 10, 20).any()
