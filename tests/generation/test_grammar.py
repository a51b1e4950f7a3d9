"""The automaton of detection and segmentation answers."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.generation.decode import generate
from paligemma_jax.generation.detection_grammar import detection_grammar, segmentation_grammar
from paligemma_jax.generation.sampling import Temperature
from paligemma_jax.processing.tokenizer import Tokenizer, append_user_pieces
from tests.generation.speaking import EOS, babbler, questions, speak, tokenizer

LABELS = ["circle", "red circle", "red", "blue square, with a hole", "Ünïcode"]
HOT = Temperature(temperature=5.0)
BOX = re.compile(r"((?:<loc\d{4}>){4})((?:<seg\d{3}>)*) (.+)")


def read(text: str) -> list[tuple[list[int], int, str]]:
    """Corners, number of codes and label of each object; fails for anything that is not exact."""
    objects = []
    for part in text.split(" ; ") if text else []:
        match = BOX.fullmatch(part)
        assert match, f"{part!r} in {text!r}"
        corners = [int(n) for n in re.findall(r"\d{4}", match[1])]
        objects.append((corners, match[2].count("<"), match[3]))
    return objects


def assert_well_formed(tokens: list[int], labels: list[str], codes: int) -> int:
    """Fails unless the answer is one of the grammar's; returns its number of objects."""
    assert tokens[-1] == EOS
    text = tokenizer().decode(tokens)
    assert tokenizer().encode(text) == tokens[:-1]  # the pieces that training would have used
    objects = read(text)
    for (y1, x1, y2, x2), found, label in objects:
        assert y1 < y2 and x1 < x2 and found == codes and label in labels
    assert len({tuple(corners) for corners, _, _ in objects}) == len(objects)
    return len(objects)


def preferring(*tokens: int) -> np.ndarray:
    """Logits that like these tokens, the first one most, and EOS least of all."""
    logits = np.zeros(tokenizer().vocab_size, np.float32)
    logits[list(tokens)] = 100 - np.arange(len(tokens)) / 20
    logits[EOS] = -100
    return logits


def corners_of(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(corners) for corners, _, _ in read(tokenizer().decode(tokens))]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    masks=st.booleans(),
    labels=st.lists(st.sampled_from(LABELS), min_size=1, max_size=3, unique=True),
    max_objects=st.integers(1, 9),
    spare=st.integers(0, 90),
)
def test_every_answer_is_well_formed(
    seed: int, masks: bool, labels: list[str], max_objects: int, spare: int
):
    make = segmentation_grammar if masks else detection_grammar
    grammar = make(tokenizer(), labels, max_objects=max_objects)
    limit = min(int(grammar.longest) + spare, 128)
    # Logits this far apart choose labels at random but rarely the end.
    tokens = speak(grammar, preferring(), limit=limit, seed=seed, noise=40.0)
    assert len(tokens) <= limit
    count = assert_well_formed(tokens, labels, 16 if masks else 0)
    assert 0 < count <= max_objects


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), limit=st.integers(24, 32))
def test_a_random_model_at_high_temperature(seed: int, limit: int):
    labels = LABELS[:3]
    answers = generate(
        babbler(),
        questions(2),
        max_new_tokens=limit,
        sampler=HOT,
        seed=seed,
        constraint=[
            make(tokenizer(), labels) for make in (detection_grammar, segmentation_grammar)
        ],
    )
    for answer, codes in zip(answers, (0, 16), strict=True):
        assert_well_formed(list(answer.tokens), labels, codes)


def test_no_box_twice():
    """Where the model wants the corner of the picture only, it has to go through its boxes."""
    grammar = detection_grammar(tokenizer(), "circle", max_objects=6)
    favourites = range(tokenizer().loc_start + 1023, tokenizer().loc_start, -1)
    separator = tokenizer().encode(" circle ; ")[1:]
    tokens = speak(grammar, preferring(*favourites, *separator), limit=128)
    assert corners_of(tokens) == [
        (1022, 1022, 1023, 1023),  # with y1 = x1 = 1022 there is no other
        (1022, 1021, 1023, 1023),
        (1022, 1021, 1023, 1022),
        (1022, 1020, 1023, 1023),
        (1022, 1020, 1023, 1022),
        (1022, 1020, 1023, 1021),
    ]
    assert_well_formed(tokens, ["circle"], 0)


def test_boxes_with_the_same_beginning_are_used_up_from_behind():
    grammar = detection_grammar(tokenizer(), "circle", max_objects=7)
    favourites = (tokenizer().loc_start + bin for bin in (1021, 1022, 1023))
    separator = tokenizer().encode(" circle ; ")[1:]
    tokens = speak(grammar, preferring(*favourites, *separator), limit=128)
    assert corners_of(tokens) == [
        (1021, 1021, 1022, 1022),
        (1021, 1021, 1022, 1023),
        (1021, 1021, 1023, 1022),
        (1021, 1021, 1023, 1023),
        (1021, 1022, 1022, 1023),
        (1021, 1022, 1023, 1023),
        (1021, 0, 1022, 1021),  # x1 = 0 is the first of those it does not care for
    ]


@pytest.mark.parametrize("masks", [False, True])
def test_the_number_of_objects_is_what_fits(masks: bool):
    make = segmentation_grammar if masks else detection_grammar
    separator = tokenizer().encode(" circle ; ")[1:]
    logits = preferring(*separator)
    one = int(make(tokenizer(), "circle").longest)
    for limit in range(one, 3 * one):
        tokens = speak(make(tokenizer(), "circle"), logits, limit=limit)
        count = assert_well_formed(tokens, ["circle"], 16 if masks else 0)
        assert count == 1 + (limit - one) // (one + len(separator) - 1)
    tokens = speak(make(tokenizer(), "circle", max_objects=1), logits, limit=128)
    assert assert_well_formed(tokens, ["circle"], 16 if masks else 0) == 1


def test_the_empty_answer():
    grammar = detection_grammar(tokenizer(), "circle")
    assert speak(grammar, -preferring(), limit=16) == [EOS]
    state = grammar.start(1, jnp.asarray(16))
    masked = grammar.allow(state, jnp.zeros((1, tokenizer().vocab_size)))
    loc = tokenizer().loc_start
    first = [EOS, *range(loc, loc + 1023)]  # a box cannot begin at the last bin
    assert np.flatnonzero(np.isfinite(masked[0])).tolist() == first


def test_a_label_that_begins_another():
    """Both can be told, and both can be followed by another object."""
    grammar = detection_grammar(tokenizer(), ["red", "red circle"], max_objects=3)
    separator = tokenizer().encode(" red ; ")[1:]
    circle = tokenizer().encode(" red circle")[1:]
    for wanted, logits in [
        ("red", preferring(*separator, *circle)),
        ("red circle", preferring(*circle, *separator)),
    ]:
        tokens = speak(grammar, logits, limit=64)
        objects = read(tokenizer().decode(tokens))
        assert [label for _, _, label in objects[:2]] == [wanted, wanted]


def test_a_piece_that_spans_label_and_separator():
    """The tokenizer decides where the label ends, not the grammar."""
    merged = Tokenizer.from_bytes(append_user_pieces(tokenizer().to_bytes(), ("▁circle▁;",)))
    grammar = detection_grammar(merged, "circle", max_objects=2)
    piece = merged.encode(" circle ;")
    assert len(piece) == 1
    logits = np.zeros(merged.vocab_size, np.float32)
    logits[piece], logits[EOS] = 1, -1
    tokens = speak(grammar, logits, limit=64)
    text = merged.decode(tokens)
    assert merged.encode(text) == tokens[:-1] and piece[0] in tokens and len(read(text)) == 2


def test_labels_as_prompts_take_them():
    listed = detection_grammar(tokenizer(), ["red circle ", "square", "square"])
    written = detection_grammar(tokenizer(), "red circle ; square")
    np.testing.assert_array_equal(listed.trie.tokens, written.trie.tokens)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "empty"),
        ("", "''"),
        (["cat", " "], "' '"),
        (["cat ; dog"], "semicolon or a line break"),
        (["cat\ndog"], "semicolon or a line break"),
        ("cat <loc0001>", "location or segmentation token"),
        ("<seg001>", "location or segmentation token"),
        ("under▁line", "cannot represent"),
        ("half \ud800", "half a character"),
    ],
)
def test_labels_that_cannot_be_answered_with(labels: str | list[str], words: str):
    for make in (detection_grammar, segmentation_grammar):
        with pytest.raises(InvalidPromptError, match=words):
            make(tokenizer(), labels)


def test_impossible_requests():
    with pytest.raises(ConfigError, match="max_objects is 0"):
        detection_grammar(tokenizer(), "circle", max_objects=0)
    grammar = segmentation_grammar(tokenizer(), "circle")
    with pytest.raises(ConfigError, match="max_new_tokens is 21.* At least 22"):
        generate(babbler(), questions(1), max_new_tokens=21, constraint=grammar)
    with pytest.raises(ConfigError, match="the model has 64"):
        grammar.check(64, 128)
