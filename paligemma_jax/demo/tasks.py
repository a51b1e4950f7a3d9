"""Prompts about demo scenes in PaliGemma's language, with their right answers.

Captions are in English, Spanish, German and French, with articles and agreement.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from paligemma_jax.demo.scene import COLORS, KINDS, Scene, Shape, choose

LANGUAGES: tuple[str, ...] = ("en", "es", "de", "fr")


@dataclasses.dataclass(frozen=True)
class Grammar:
    """How one language names things; gender is "m", "f" or "n"."""

    nouns: dict[str, tuple[str, str]]  # kind -> (noun, gender)
    adjectives: dict[str, dict[str, str]]  # color -> gender -> form
    articles: dict[str, str]  # gender -> indefinite article
    adjective_first: bool
    conjunction: str
    word: str
    number: str


def _forms(genders: str, table: dict[str, str]) -> dict[str, dict[str, str]]:
    """Spells out {"red": "rojo roja"} as {"red": {"m": "rojo", "f": "roja"}}."""
    result = {}
    for color, forms in table.items():
        words = forms.split()
        result[color] = dict(zip(genders, words * (len(genders) // len(words)), strict=True))
    return result


GRAMMARS: dict[str, Grammar] = {
    "en": Grammar(
        nouns={kind: (kind, "n") for kind in KINDS},
        adjectives=_forms("n", {color: color for color in COLORS}),
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
    """A shape with its article, such as "un cercle rouge"."""
    grammar = GRAMMARS[language]
    noun, gender = grammar.nouns[shape.kind]
    adjective = grammar.adjectives[shape.color][gender]
    pair = (adjective, noun) if grammar.adjective_first else (noun, adjective)
    return " ".join((grammar.articles[gender], *pair))


def caption(scene: Scene, language: str) -> str:
    """The shapes from left to right, then the text: "a red circle and a word"."""
    grammar = GRAMMARS[language]
    ordered = sorted(scene.shapes, key=lambda shape: shape.center[1])
    items = [describe(shape, language) for shape in ordered]
    if scene.text is not None:
        items.append(grammar.number if scene.text.is_number else grammar.word)
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {grammar.conjunction} {items[-1]}"


SAME_PROMPT = "answer en are these the same?"
ABSENT_FRACTION = (
    0.08  # of `detect` prompts with nothing to find, and again with one label too many
)
NO_SHAPE_FRACTION, NO_TEXT_FRACTION = 0.25, 0.07  # of scenes without any that are asked for it
MOST_MASKS = 2  # in one answer
_BORDER = 0.03  # "where" is asked only this far from the lines between thirds
_REGIONS = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt (PaliGemma's prefix), the right answer (its suffix) and the task's name."""

    prompt: str
    answer: str
    task: str


@dataclasses.dataclass(frozen=True)
class Label:
    """What a prompt can name: "red circle", "circle", "red shape" or "shape"."""

    color: str | None
    kind: str | None

    def __str__(self) -> str:
        return " ".join(part for part in (self.color, self.kind or "shape") if part)

    def matches(self, shape: Shape) -> bool:
        """Whether a shape is one of these."""
        return self.color in (None, shape.color) and self.kind in (None, shape.kind)

    def find(self, scene: Scene) -> list[Shape]:
        """The shapes that match, from left to right."""
        return sorted(filter(self.matches, scene.shapes), key=lambda shape: shape.center[1])

    def overlaps(self, other: "Label") -> bool:
        """Whether one shape could match both labels."""
        same_color = None in (self.color, other.color) or self.color == other.color
        same_kind = None in (self.kind, other.kind) or self.kind == other.kind
        return same_color and same_kind


FULL_LABELS = tuple(Label(color, kind) for color in COLORS for kind in KINDS)
KIND_LABELS = tuple(Label(None, kind) for kind in KINDS)
COLOR_LABELS = tuple(Label(color, None) for color in COLORS)
ANY_SHAPE = Label(None, None)


def near_misses(scene: Scene, labels: Sequence[Label]) -> list[Label]:
    """Absent labels whose color or kind is in the scene; any absent ones if none are."""
    absent = [label for label in labels if not label.find(scene)]
    colors, kinds = {s.color for s in scene.shapes}, {s.kind for s in scene.shapes}
    return [label for label in absent if label.color in colors or label.kind in kinds] or absent


def plural(label: Label) -> str:
    """A label in the plural, such as "red crosses"."""
    return f"{label}es" if label.kind == "cross" else f"{label}s"


def location_tokens(shape: Shape) -> str:
    """PaliGemma's box of a shape: "<locY1><locX1><locY2><locX2>", 1024 bins."""
    bins = (min(max(round(value * 1023), 0), 1023) for value in shape.box)
    return "".join(f"<loc{value:04d}>" for value in bins)


def count_answer(scene: Scene, label: Label) -> Example:
    """Asks how many shapes match a label."""
    prompt = f"answer en how many {plural(label)} are there?"
    return Example(prompt, str(len(label.find(scene))), "count")


def detect_answer(scene: Scene, labels: Sequence[Label]) -> Example:
    """Asks for the boxes of one or several labels; what is not there is left out."""
    prompt = "detect " + " ; ".join(map(str, labels))
    found = [f"{location_tokens(shape)} {label}" for label in labels for shape in label.find(scene)]
    return Example(prompt, " ; ".join(found), "detect")


def caption_answer(scene: Scene, language: str) -> Example:
    """Asks for a caption in "en", "es", "de" or "fr"."""
    return Example(f"caption {language}", caption(scene, language), f"caption_{language}")


def ocr_answer(scene: Scene) -> Example:
    """Asks for the text; the answer is empty where there is none."""
    return Example("ocr", scene.text.string if scene.text else "", "ocr")


def same_answer(same: bool) -> Example:
    """Asks whether two images show the same."""
    return Example(SAME_PROMPT, "yes" if same else "no", "same")


def region(shape: Shape) -> str | None:
    """The ninth of the image that a shape's center is in; None near a dividing line."""
    if any(abs(value - line) < _BORDER for value in shape.center for line in (1 / 3, 2 / 3)):
        return None
    y, x = shape.center
    return _REGIONS[int(y * 3)][int(x * 3)]


def sample_count(scene: Scene, rng: np.random.Generator) -> Example:
    """Asks for a number, zeros included, large numbers more often than they come up."""
    labels = (FULL_LABELS, KIND_LABELS, COLOR_LABELS, (ANY_SHAPE,))[
        int(rng.choice(4, p=(0.33, 0.24, 0.24, 0.19)))
    ]
    by_count: dict[int, list[Label]] = {}
    for label in labels:
        by_count.setdefault(len(label.find(scene)), []).append(label)
    numbers = sorted(by_count)
    weights = np.array([(0.4, 0.5, 2, 4, 6, 6)[number] for number in numbers])
    number = numbers[int(rng.choice(len(numbers), p=weights / weights.sum()))]
    candidates = by_count[number]
    if number == 0 and rng.random() < 0.7:
        candidates = near_misses(scene, labels)
    return count_answer(scene, choose(rng, candidates))


def sample_color(scene: Scene, rng: np.random.Generator) -> Example | None:
    """Asks for the color of a shape whose kind is unique; None if there is none."""
    unique = [found[0] for label in KIND_LABELS if len(found := label.find(scene)) == 1]
    if not unique:
        return None
    shape, word = choose(rng, unique), choose(rng, ("colour", "color"))
    return Example(f"answer en what {word} is the {shape.kind}?", shape.color, "color")


def sample_where(scene: Scene, rng: np.random.Generator) -> Example | None:
    """Asks for the place of a unique shape; None if none is clearly in one ninth."""
    options = []
    for shape in scene.shapes:
        place = region(shape)
        for label in (Label(shape.color, shape.kind), Label(None, shape.kind)):
            if place is not None and len(label.find(scene)) == 1:
                options.append((label, place))
    if not options:
        return None
    label, place = choose(rng, options)
    return Example(f"answer en where is the {label}?", place, "where")


def sample_exists(scene: Scene, rng: np.random.Generator) -> Example:
    """Asks whether something is there: half yes, and most no are near misses."""
    labels = FULL_LABELS if rng.random() < 0.75 else KIND_LABELS
    present = [label for label in labels if label.find(scene)]
    absent = [label for label in labels if not label.find(scene)]
    if present and (rng.random() < 0.5 or not absent):
        return Example(f"answer en is there a {choose(rng, present)}?", "yes", "exists")
    if rng.random() < 0.75:
        absent = near_misses(scene, labels)
    return Example(f"answer en is there a {choose(rng, absent)}?", "no", "exists")


def sample_detect(scene: Scene, rng: np.random.Generator) -> Example:
    """Asks for boxes of one label or several; now and then some or all are not there."""
    draw = rng.random()
    absent = near_misses(scene, FULL_LABELS if rng.random() < 0.7 else KIND_LABELS)
    if (draw < ABSENT_FRACTION or not scene.shapes) and absent:
        return detect_answer(scene, [choose(rng, absent)])
    form = rng.random()
    if form < 0.12:
        return detect_answer(scene, [ANY_SHAPE])
    wanted = 1 if form < 0.35 else int(rng.integers(2, 4))
    present = [Label(s.color, s.kind if rng.random() < 0.9 else None) for s in scene.shapes]
    present += [Label(None, shape.kind) for shape in scene.shapes]
    labels: list[Label] = []
    for i in rng.permutation(len(present)).tolist():
        if len(labels) < wanted and not any(map(present[i].overlaps, labels)):
            labels.append(present[i])
    if draw > 1 - ABSENT_FRACTION:
        extra = [label for label in absent if not any(map(label.overlaps, labels))]
        if extra:
            labels.insert(int(rng.integers(len(labels) + 1)), choose(rng, extra))
    return detect_answer(scene, labels)


Sampler = Callable[[Scene, np.random.Generator], Example | None]
SAMPLERS: dict[str, Sampler] = {
    **{f"caption_{code}": lambda s, _, code=code: caption_answer(s, code) for code in LANGUAGES},
    "count": sample_count,
    "color": sample_color,
    "where": sample_where,
    "exists": sample_exists,
    "detect": sample_detect,
    "ocr": lambda scene, _: ocr_answer(scene),
}


def eligible_tasks(
    scene: Scene, rng: np.random.Generator, samplers: Mapping[str, Sampler] = SAMPLERS
) -> list[str]:
    """The tasks to ask about a scene: rarely about shapes or text that are not there."""
    unfit: set[str] = set()
    if not scene.shapes and rng.random() >= NO_SHAPE_FRACTION:
        unfit |= {"count", "exists", "detect", "segment"}
    if scene.text is None and rng.random() >= NO_TEXT_FRACTION:
        unfit.add("ocr")
    return [task for task in samplers if task not in unfit]


def examples(scene: Scene, rng: np.random.Generator) -> list[Example]:
    """One example of every task that fits the scene, captions in every language."""
    drawn = [SAMPLERS[task](scene, rng) for task in eligible_tasks(scene, rng)]
    return [example for example in drawn if example is not None]
