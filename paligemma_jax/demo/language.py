"""Captions of scenes in English, Spanish, German and French, with articles and agreement."""

import dataclasses

from paligemma_jax.demo.scene import Scene, Shape

LANGUAGES: tuple[str, ...] = ("en", "es", "de", "fr")


@dataclasses.dataclass(frozen=True)
class Grammar:
    """How one language names things; gender is "m", "f" or "n"."""

    nouns: dict[str, tuple[str, str]]  # kind -> (noun, gender)
    adjectives: dict[str, dict[str, str]]  # colour -> gender -> form
    articles: dict[str, str]  # gender -> indefinite article
    adjective_first: bool
    conjunction: str
    word: str
    number: str


def _forms(genders: str, table: dict[str, str]) -> dict[str, dict[str, str]]:
    """Spells out {"red": "rojo roja"} as {"red": {"m": "rojo", "f": "roja"}}."""
    result = {}
    for colour, forms in table.items():
        words = forms.split()
        result[colour] = dict(zip(genders, words * (len(genders) // len(words)), strict=True))
    return result


_COLOURS = ("red", "green", "blue", "yellow", "purple", "black", "white")

GRAMMARS: dict[str, Grammar] = {
    "en": Grammar(
        nouns={k: (k, "n") for k in ("circle", "square", "triangle", "star", "cross")},
        adjectives=_forms("n", {colour: colour for colour in _COLOURS}),
        articles={"n": "a"},
        adjective_first=True,
        conjunction="and",
        word="a word",
        number="a number",
    ),
    "es": Grammar(
        nouns={
            "circle": ("círculo", "m"), "square": ("cuadrado", "m"), "triangle": ("triángulo", "m"),
            "star": ("estrella", "f"), "cross": ("cruz", "f"),
        },
        adjectives=_forms("mf", {
            "red": "rojo roja", "green": "verde", "blue": "azul", "yellow": "amarillo amarilla",
            "purple": "morado morada", "black": "negro negra", "white": "blanco blanca",
        }),
        articles={"m": "un", "f": "una"},
        adjective_first=False,
        conjunction="y",
        word="una palabra",
        number="un número",
    ),
    "de": Grammar(
        nouns={
            "circle": ("Kreis", "m"), "square": ("Quadrat", "n"), "triangle": ("Dreieck", "n"),
            "star": ("Stern", "m"), "cross": ("Kreuz", "n"),
        },
        adjectives=_forms("mn", {
            "red": "roter rotes", "green": "grüner grünes", "blue": "blauer blaues",
            "yellow": "gelber gelbes", "purple": "violetter violettes",
            "black": "schwarzer schwarzes", "white": "weißer weißes",
        }),
        articles={"m": "ein", "n": "ein"},
        adjective_first=True,
        conjunction="und",
        word="ein Wort",
        number="eine Zahl",
    ),
    "fr": Grammar(
        nouns={
            "circle": ("cercle", "m"), "square": ("carré", "m"), "triangle": ("triangle", "m"),
            "star": ("étoile", "f"), "cross": ("croix", "f"),
        },
        adjectives=_forms("mf", {
            "red": "rouge", "green": "vert verte", "blue": "bleu bleue", "yellow": "jaune",
            "purple": "violet violette", "black": "noir noire", "white": "blanc blanche",
        }),
        articles={"m": "un", "f": "une"},
        adjective_first=False,
        conjunction="et",
        word="un mot",
        number="un nombre",
    ),
}  # fmt: skip


def describe(shape: Shape, language: str) -> str:
    """Returns a shape with its article, such as "un cercle rouge"."""
    grammar = GRAMMARS[language]
    noun, gender = grammar.nouns[shape.kind]
    adjective = grammar.adjectives[shape.colour][gender]
    pair = (adjective, noun) if grammar.adjective_first else (noun, adjective)
    return " ".join((grammar.articles[gender], *pair))


def caption(scene: Scene, language: str) -> str:
    """Returns the shapes from left to right, then the text: "a red circle and a word"."""
    grammar = GRAMMARS[language]
    ordered = sorted(scene.shapes, key=lambda shape: shape.centre[1])
    items = [describe(shape, language) for shape in ordered]
    if scene.text is not None:
        items.append(grammar.number if scene.text.is_number else grammar.word)
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {grammar.conjunction} {items[-1]}"
