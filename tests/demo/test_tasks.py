"""Prompts, answers and captions: right for fixed scenes, balanced over many."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from checkpoints.training.prompts import sample_examples
from paligemma_jax.demo.scene import (
    COLORS,
    KINDS,
    TRAINING,
    Scene,
    Shape,
    Text,
    sample_scene,
    split_rng,
)
from paligemma_jax.demo.tasks import (
    GRAMMARS,
    LANGUAGES,
    SAMPLERS,
    Example,
    Label,
    caption,
    count_answer,
    describe,
    detect_answer,
    examples,
    location_tokens,
    ocr_answer,
    plural,
    region,
    same_answer,
)


def shape(name: str, y: float, x: float, side: float = 0.2) -> Shape:
    color, kind = name.split()
    half = side / 2
    return Shape(kind=kind, color=color, box=(y - half, x - half, y + half, x + half))


SCENE = Scene(
    shapes=(
        shape("red circle", 0.2, 0.15),
        shape("blue square", 0.5, 0.5),
        shape("red circle", 0.8, 0.6),
        shape("red star", 0.5, 0.85),
    ),
    text=None,
    background=0,
)
WORD = Text(string="SUN", box=(0.1, 0.1, 0.3, 0.6), font="DejaVuSans", capital=0.15)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, Example]]:
    weights = dict.fromkeys(SAMPLERS, 0.08) | {"count": 0.16, "detect": 0.2, "ocr": 0.2}
    pairs = []
    for index in range(1200):
        rng = split_rng(9, TRAINING, index)
        scene = sample_scene(rng)
        pairs += [(scene, example) for example in sample_examples(scene, rng, 4, weights)]
    return pairs


@pytest.mark.parametrize(
    ("label", "plural_form", "number"),
    [
        (Label("red", "circle"), "red circles", "2"),
        (Label(None, "circle"), "circles", "2"),
        (Label("red", None), "red shapes", "3"),
        (Label(None, None), "shapes", "4"),
        (Label("green", "cross"), "green crosses", "0"),
    ],
)
def test_counts(label: Label, plural_form: str, number: str):
    assert plural(label) == plural_form
    prompt = f"answer en how many {plural_form} are there?"
    assert count_answer(SCENE, label) == Example(prompt, number, "count")


def test_boxes_come_in_prompt_order_then_left_to_right():
    example = detect_answer(SCENE, [Label("blue", "square"), Label("red", "circle")])
    assert example.prompt == "detect blue square ; red circle"
    assert example.answer == (
        "<loc0409><loc0409><loc0614><loc0614> blue square ; "
        "<loc0102><loc0051><loc0307><loc0256> red circle ; "
        "<loc0716><loc0512><loc0921><loc0716> red circle"
    )


def test_what_is_absent_is_left_out():
    assert detect_answer(SCENE, [Label("green", "cross")]).answer == ""
    both = detect_answer(SCENE, [Label("green", "cross"), Label(None, "star")])
    assert both.prompt == "detect green cross ; star"
    assert re.fullmatch(r"(<loc\d{4}>){4} star", both.answer)


def test_locations_stay_in_range():
    whole = Shape(kind="square", color="red", box=(0.0, -0.01, 1.0, 1.01))
    assert location_tokens(whole) == "<loc0000><loc0000><loc1023><loc1023>"


@pytest.mark.parametrize(
    ("y", "x", "place"),
    [
        (0.1, 0.1, "top left"),
        (0.1, 0.5, "top"),
        (0.5, 0.9, "right"),
        (0.5, 0.5, "centre"),
        (0.9, 0.5, "bottom"),
        (0.9, 0.9, "bottom right"),
        (0.35, 0.5, None),
        (0.5, 0.65, None),
    ],
)
def test_regions(y: float, x: float, place: str | None):
    assert region(shape("red circle", y, x, 0.1)) == place


def test_plain_prompts():
    assert same_answer(True) == Example("answer en are these the same?", "yes", "same")
    assert ocr_answer(SCENE).answer == ""
    written = Scene(shapes=(), text=WORD, background=0)
    assert ocr_answer(written) == Example("ocr", "SUN", "ocr")


def test_every_task_once():
    found = [example.task for example in examples(SCENE, np.random.default_rng(0))]
    assert len(set(found)) == len(found)
    assert set(SAMPLERS) - {"ocr"} <= set(found)


def test_labels_of_one_prompt_never_share_an_object(drawn: list[tuple[Scene, Example]]):
    several = 0
    for scene, example in drawn:
        if example.task != "detect":
            continue
        names = example.prompt.removeprefix("detect ").split(" ; ")
        several += len(names) > 1
        boxes = [part.rpartition(" ")[0] for part in example.answer.split(" ; ")]
        assert len(boxes) == len(set(boxes)) <= max(len(scene.shapes), 1)
        for part in filter(None, example.answer.split(" ; ")):
            assert re.fullmatch(r"(<loc\d{4}>){4} (.+)", part)
            assert part.rpartition(">")[2].strip() in names
    assert several > 150


def test_questions_name_unique_things(drawn: list[tuple[Scene, Example]]):
    spellings = collections.Counter()
    for scene, example in drawn:
        if example.task == "color":
            match = re.fullmatch(r"answer en what (colou?r) is the (\w+)\?", example.prompt)
            assert match is not None
            spellings[match[1]] += 1
            assert [s.color for s in scene.shapes if s.kind == match[2]] == [example.answer]
        if example.task == "where":
            name = example.prompt.removeprefix("answer en where is the ")[:-1]
            places = [region(s) for s in scene.shapes if name in (s.name, s.kind)]
            assert places == [example.answer]
    assert 0.4 < spellings["color"] / spellings.total() < 0.6


def test_answers_are_balanced(drawn: list[tuple[Scene, Example]]):
    answers: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for _, example in drawn:
        answers[example.task][example.answer] += 1
    assert 0.4 < answers["exists"]["yes"] / answers["exists"].total() < 0.6
    assert 0.15 < answers["count"]["0"] / answers["count"].total() < 0.35
    assert all(answers["count"][str(number)] for number in range(6))
    assert 0.02 < answers["detect"][""] / answers["detect"].total() < 0.17
    assert 0 < answers["ocr"][""] / answers["ocr"].total() < 0.15
    assert len(answers["where"]) == 9
    assert set(answers) == set(SAMPLERS)


def test_existence_is_true(drawn: list[tuple[Scene, Example]]):
    for scene, example in drawn:
        if example.task == "exists":
            name = example.prompt.removeprefix("answer en is there a ")[:-1]
            there = any(name in (s.name, s.kind) for s in scene.shapes)
            assert example.answer == ("yes" if there else "no")


@pytest.mark.parametrize(
    ("language", "several", "two", "one"),
    [
        ("en", "a white star, a red circle, a blue square and a word",
         "a purple cross and a number", "a black triangle"),
        ("es", "una estrella blanca, un círculo rojo, un cuadrado azul y una palabra",
         "una cruz morada y un número", "un triángulo negro"),
        ("de", "ein weißer Stern, ein roter Kreis, ein blaues Quadrat und ein Wort",
         "ein violettes Kreuz und eine Zahl", "ein schwarzes Dreieck"),
        ("fr", "une étoile blanche, un cercle rouge, un carré bleu et un mot",
         "une croix violette et un nombre", "un triangle noir"),
    ],
)  # fmt: skip
def test_captions(language: str, several: str, two: str, one: str):
    names = (("red circle", 0.5), ("blue square", 0.8), ("white star", 0.2))
    shapes = tuple(shape(name, 0.5, x) for name, x in names)
    number = dataclasses.replace(WORD, string="42")
    assert caption(Scene(shapes=shapes, text=WORD, background=0), language) == several
    cross = (shape("purple cross", 0.5, 0.5),)
    assert caption(Scene(shapes=cross, text=number, background=0), language) == two
    triangle = (shape("black triangle", 0.5, 0.5),)
    assert caption(Scene(shapes=triangle, text=None, background=0), language) == one


@pytest.mark.parametrize(
    ("language", "name", "expected"),
    [
        ("es", "yellow star", "una estrella amarilla"),
        ("es", "green cross", "una cruz verde"),
        ("es", "purple square", "un cuadrado morado"),
        ("de", "green circle", "ein grüner Kreis"),
        ("de", "yellow square", "ein gelbes Quadrat"),
        ("de", "white cross", "ein weißes Kreuz"),
        ("de", "purple star", "ein violetter Stern"),
        ("fr", "green star", "une étoile verte"),
        ("fr", "blue cross", "une croix bleue"),
        ("fr", "white square", "un carré blanc"),
        ("fr", "yellow triangle", "un triangle jaune"),
    ],
)
def test_articles_and_adjectives_agree(language: str, name: str, expected: str):
    assert describe(shape(name, 0.5, 0.5), language) == expected


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_shape_has_its_own_name(language: str):
    names = {describe(shape(f"{c} {k}", 0.5, 0.5), language) for c in COLORS for k in KINDS}
    assert len(names) == len(COLORS) * len(KINDS)
    assert set(GRAMMARS[language].nouns) == set(KINDS)
