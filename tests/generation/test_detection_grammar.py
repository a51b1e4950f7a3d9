"""The automaton of detection and segmentation answers, and the statistics of their locations."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paligemma_jax as pg
from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import held_out_scenes
from paligemma_jax.demo.tasks import sample_detect
from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.generation import detection_grammar as module
from paligemma_jax.generation.detection_grammar import detection_grammar, segmentation_grammar
from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.results import Generation
from paligemma_jax.generation.token_statistics import LocationStatistics, TokenStatistics
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.tokenizer import Tokenizer, append_user_pieces
from tests.generation.decoding import EOS, babbler, questions, speak, tokenizer
from tests.tiny import prompts

LABELS = ["circle", "red circle", "red", "blue square, with a hole", "Ünïcode"]
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
        temperature=5.0,
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
    state = grammar.start(1, jnp.asarray([16]))
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
        (["cat ; dog"], "semicolon or line break"),
        (["cat\ndog"], "semicolon or line break"),
        ("cat <loc0001>", "location or segmentation token"),
        ("<seg001>", "location or segmentation token"),
        ("under▁line", "can represent"),
        ("half \ud800", "half a character"),
    ],
)
def test_labels_that_cannot_be_answered_with(labels: str | list[str], words: str):
    for make in (detection_grammar, segmentation_grammar):
        with pytest.raises(InvalidPromptError, match=words):
            make(tokenizer(), labels)


def test_impossible_requests():
    for count in (0, True, 1025, 10**400):
        with pytest.raises(ConfigError, match="max_objects"):
            detection_grammar(tokenizer(), "cat", max_objects=count)
    grammar = segmentation_grammar(tokenizer(), "circle")
    with pytest.raises(ConfigError, match="22.*21"):
        generate(babbler(), questions(1), max_new_tokens=21, constraint=grammar)
    with pytest.raises(ConfigError, match="64 tokens"):
        grammar.check(64, 128)


SCENES = 8


def test_greedy_answers_that_fit_are_the_same():
    pali = pg.from_pretrained("demo", dtype="float32")
    tokenizer = pali.processor.tokenizer
    rng = np.random.default_rng(0)
    scenes = held_out_scenes(count=SCENES)
    prompts = [sample_detect(scene, rng).prompt for scene in scenes]
    labels = [prompt.removeprefix("detect ").split(" ; ") for prompt in prompts]
    pictures = [render(scene, pali.config.img.image_size) for scene in scenes]
    batch = pali.processor(pictures, prompts)
    grammars = [detection_grammar(tokenizer, names, max_objects=16) for names in labels]

    def ask(constraint: list | None) -> list[Generation]:
        return generate(pali.model, batch, max_new_tokens=64, constraint=constraint)

    fitting = 0
    for free, held, names in zip(ask(None), ask(grammars), labels, strict=True):
        assert_well_formed(list(held.tokens), names, 0)
        try:
            assert_well_formed(list(free.tokens), names, 0)
        except AssertionError:
            continue
        fitting += 1
        assert held.tokens == free.tokens
        np.testing.assert_allclose(held.logprobs, free.logprobs, atol=1e-4)
    assert fitting > SCENES // 2


LOC = tokenizer().loc_start


def logsumexp(values: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    return np.logaddexp.reduce(values.astype(float), axis=-1)


def test_the_mass_of_locations_and_of_the_neighbourhood():
    logits = np.random.default_rng(0).normal(size=(6, tokenizer().vocab_size)).astype(np.float32)
    tokens = [LOC, LOC + 3, LOC + 500, LOC + 1023, LOC - 1, LOC + 1024]
    statistics = LocationStatistics(LOC, radii=(5, 2000))
    assert isinstance(statistics, TokenStatistics)
    seen = np.asarray(statistics.measure(jnp.asarray(logits), jnp.asarray(tokens)))
    everything = logsumexp(logits)
    locations = logits[:, LOC : LOC + 1024]
    np.testing.assert_allclose(seen[:, 0], logsumexp(locations) - everything, rtol=1e-5)
    for row, (low, high) in enumerate([(0, 5), (0, 8), (495, 505), (1018, 1023)]):
        near = logsumexp(locations[row, low : high + 1]) - everything[row]
        np.testing.assert_allclose(seen[row, 1], near, rtol=1e-5)
    assert (seen[4:, 1:] == 0).all()
    np.testing.assert_allclose(seen[:4, 2], seen[:4, 0], rtol=1e-5)


def test_radius_zero_is_the_token_itself():
    logits = jax.random.normal(jax.random.key(0), (1, tokenizer().vocab_size))
    seen = LocationStatistics(LOC, radii=(0,)).measure(logits, jnp.asarray([LOC + 7]))
    np.testing.assert_allclose(seen[0, 1], jax.nn.log_softmax(logits)[0, LOC + 7], rtol=1e-5)


def test_extras_go_with_the_tokens():
    """A number pair a token, EOS included, and the tokens are those without."""
    grammar = detection_grammar(tokenizer(), ["circle", "square"])
    ask: dict[str, Any] = dict(max_new_tokens=16, constraint=grammar)
    plain = generate(babbler(), questions(2), **ask)
    seen = generate(
        babbler(), questions(2), **ask, token_statistics=LocationStatistics(LOC, radii=(2,))
    )
    for row, observed in zip(plain, seen, strict=True):
        assert row.extras == () and observed.tokens == row.tokens
        assert len(observed.extras) == len(row.tokens)
        for token, logprob, (mass, near) in zip(
            observed.tokens, observed.logprobs, observed.extras, strict=True
        ):
            located = LOC <= token < LOC + 1024
            assert logprob <= near <= mass <= 0 if located else mass < 0 == near


def test_impossible_statistics(tiny_model: PaliGemma):
    with pytest.raises(ConfigError, match="radii"):
        LocationStatistics(LOC, radii=(4, -1))
    with pytest.raises(ConfigError, match="vocabulary of 64"):
        generate(
            tiny_model, prompts([2], 4), max_new_tokens=2, token_statistics=LocationStatistics(LOC)
        )


def test_the_tables_of_the_same_labels_are_made_once(monkeypatch):
    made = detection_grammar(tokenizer(), "cat ; dog", max_objects=9)
    monkeypatch.setattr(module, "label_paths", None)
    again = detection_grammar(tokenizer(), ["cat", "dog"], max_objects=9)
    assert jax.tree.structure(again) == jax.tree.structure(made)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(made)))
    with pytest.raises(TypeError):
        segmentation_grammar(tokenizer(), ["cat", "dog"], max_objects=9)
