"""Captions in four languages: order, articles, gender, agreement."""

import pytest

from paligemma_jax.demo.scene import COLOURS, KINDS, Scene, Shape, Text
from paligemma_jax.demo.tasks import GRAMMARS, LANGUAGES, caption, describe


def shape(name: str, x: float) -> Shape:
    colour, kind = name.split()
    return Shape(kind=kind, colour=colour, box=(0.4, x - 0.1, 0.6, x + 0.1))


def text(string: str) -> Text:
    return Text(string=string, box=(0.1, 0.1, 0.3, 0.6), font="DejaVuSans", capital=0.15)


def scene(*shapes: Shape, written: str = "") -> Scene:
    return Scene(shapes=shapes, text=text(written) if written else None, background=0)


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en", "a white star, a red circle, a blue square and a word"),
        ("es", "una estrella blanca, un círculo rojo, un cuadrado azul y una palabra"),
        ("de", "ein weißer Stern, ein roter Kreis, ein blaues Quadrat und ein Wort"),
        ("fr", "une étoile blanche, un cercle rouge, un carré bleu et un mot"),
    ],
)
def test_lists_left_to_right_and_text_last(language: str, expected: str):
    shapes = shape("red circle", 0.5), shape("blue square", 0.8), shape("white star", 0.2)
    assert caption(scene(*shapes, written="HELLO"), language) == expected


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en", "a purple cross and a number"),
        ("es", "una cruz morada y un número"),
        ("de", "ein violettes Kreuz und eine Zahl"),
        ("fr", "une croix violette et un nombre"),
    ],
)
def test_two_items_need_no_comma(language: str, expected: str):
    assert caption(scene(shape("purple cross", 0.5), written="42"), language) == expected


@pytest.mark.parametrize(
    ("language", "one", "word"),
    [
        ("en", "a black triangle", "a word"),
        ("es", "un triángulo negro", "una palabra"),
        ("de", "ein schwarzes Dreieck", "ein Wort"),
        ("fr", "un triangle noir", "un mot"),
    ],
)
def test_a_single_item_stands_alone(language: str, one: str, word: str):
    assert caption(scene(shape("black triangle", 0.5)), language) == one
    assert caption(scene(written="SUN"), language) == word


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
    assert describe(shape(name, 0.5), language) == expected


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_shape_has_its_own_name(language: str):
    names = {describe(shape(f"{c} {k}", 0.5), language) for c in COLOURS for k in KINDS}
    assert len(names) == len(COLOURS) * len(KINDS)
    assert set(GRAMMARS[language].nouns) == set(KINDS)
