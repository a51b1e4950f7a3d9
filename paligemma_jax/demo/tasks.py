"""PaliGemma's prompts about demo scenes, with their right answers.

Captions of scenes in English, Spanish, German and French, with articles and agreement.

Masks of the demo world for its mask codec: what 64 x 64 crops of shapes look like.

The codes of every shape's mask, looked up: encoding each anew would hold up training.

Where the embedded demo checkpoint lies.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from paligemma_jax.demo.render import shape_mask
from paligemma_jax.demo.scene import (
    COLOURS,
    KINDS,
    MASKS,
    Scene,
    Shape,
    box_around,
    extent,
    sample_scene,
    split_rng,
)
from paligemma_jax.errors import CheckpointError
from paligemma_jax.processing.masks import MaskCodec, crop_for_codec
from paligemma_jax.weights.store import is_store

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


MASK_PICTURE = 448  # pixels a side of the pictures that masks are cut from


def codec_crop(shape: Shape) -> np.ndarray:
    """f32[64, 64] in [0, 1]: the mask of a shape, cut to its box as the codec takes it."""
    bins = np.clip(np.round(np.array(shape.box) * 1023), 0, 1023) / 1023
    y1, x1, y2, x2 = bins.tolist()
    return crop_for_codec(shape_mask(shape, MASK_PICTURE), (y1, x1, y2, x2))


def codec_crops(seed: int, split: int, count: int) -> np.ndarray:
    """f32[count, 64, 64]: crops of the shapes of as many scenes as it takes."""
    crops: list[np.ndarray] = []
    index = 0
    while len(crops) < count:
        scene = sample_scene(split_rng(seed, split + MASKS, index), allow_text=False)
        crops += map(codec_crop, scene.shapes)
        index += 1
    return np.stack(crops[:count])


_ANGLES = np.arange(-24, 25) / 2  # degrees
_STYLES = np.arange(11) / 10
_SIDE = 0.9  # of the picture that a mask is drawn in
_Key = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class MaskCodes:
    """Codes by kind, angle to half a degree, and style to a tenth: what a 64 x 64 crop shows."""

    table: Mapping[_Key, tuple[int, ...]]

    def of(self, shape: Shape) -> tuple[int, ...]:
        """The sixteen codes of a shape."""
        return self.table[_key(shape.kind, shape.angle, shape.style)]


def build_mask_codes(codec: MaskCodec) -> MaskCodes:
    """Draws and encodes a mask of every entry."""
    crops: dict[_Key, np.ndarray] = {}
    for kind in KINDS:
        for angle in _ANGLES.tolist():
            for style in _STYLES.tolist():
                key = _key(kind, angle, style)
                if key not in crops:
                    height, width = (side * _SIDE for side in extent(kind, angle, style))
                    box = box_around(0.5, 0.5, height, width)
                    shape = Shape(kind=kind, colour="black", box=box, angle=angle, style=style)
                    crops[key] = codec_crop(shape)
    codes = codec.encode(np.stack(list(crops.values())))
    return MaskCodes(dict(zip(crops, map(tuple, codes.tolist()), strict=True)))


def _key(kind: str, angle: float, style: float) -> _Key:
    turned = 0 if kind == "circle" else round(2 * angle)
    fat = round(10 * style) if kind in ("star", "cross") else 0
    return kind, turned, fat


SAME_PROMPT = "answer en are these the same?"
ABSENT_SHARE = 0.08  # of `detect` prompts with nothing to find, and again with one label too many
NO_SHAPE_SHARE, NO_TEXT_SHARE = 0.25, 0.07  # of scenes without any, share that is asked for it
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

    colour: str | None
    kind: str | None

    def __str__(self) -> str:
        return " ".join(part for part in (self.colour, self.kind or "shape") if part)

    def matches(self, shape: Shape) -> bool:
        """Returns whether a shape is one of these."""
        return self.colour in (None, shape.colour) and self.kind in (None, shape.kind)

    def find(self, scene: Scene) -> list[Shape]:
        """Returns the shapes that match, from left to right."""
        return sorted(filter(self.matches, scene.shapes), key=lambda shape: shape.centre[1])

    def overlaps(self, other: "Label") -> bool:
        """Returns whether one shape could match both labels."""
        same_colour = None in (self.colour, other.colour) or self.colour == other.colour
        same_kind = None in (self.kind, other.kind) or self.kind == other.kind
        return same_colour and same_kind


FULL_LABELS = tuple(Label(colour, kind) for colour in COLOURS for kind in KINDS)
KIND_LABELS = tuple(Label(None, kind) for kind in KINDS)
COLOUR_LABELS = tuple(Label(colour, None) for colour in COLOURS)
ANY_SHAPE = Label(None, None)


def _choice(rng: np.random.Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]


def _near_misses(scene: Scene, labels: Sequence[Label]) -> list[Label]:
    """Returns absent labels whose colour or kind is in the scene; any absent ones if none are."""
    absent = [label for label in labels if not label.find(scene)]
    colours, kinds = {s.colour for s in scene.shapes}, {s.kind for s in scene.shapes}
    return [label for label in absent if label.colour in colours or label.kind in kinds] or absent


def plural(label: Label) -> str:
    """Returns a label in the plural, such as "red crosses"."""
    return f"{label}es" if label.kind == "cross" else f"{label}s"


def location_tokens(shape: Shape) -> str:
    """Returns PaliGemma's box of a shape: "<locY1><locX1><locY2><locX2>", 1024 bins."""
    bins = (min(max(round(value * 1023), 0), 1023) for value in shape.box)
    return "".join(f"<loc{value:04d}>" for value in bins)


def mask_tokens(codes: Sequence[int]) -> str:
    """Returns PaliGemma's mask of an object: sixteen "<seg...>"."""
    return "".join(f"<seg{code:03d}>" for code in codes)


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
    """Asks whether two pictures show the same."""
    return Example(SAME_PROMPT, "yes" if same else "no", "same")


def segment_answer(scene: Scene, labels: Sequence[Label], codes: MaskCodes) -> Example:
    """Asks for the boxes and masks of one or several labels; what is not there is left out."""
    found = [
        f"{location_tokens(shape)}{mask_tokens(codes.of(shape))} {label}"
        for label in labels
        for shape in label.find(scene)
    ]
    return Example("segment " + " ; ".join(map(str, labels)), " ; ".join(found), "segment")


def region(shape: Shape) -> str | None:
    """Returns the ninth of the picture that a shape's centre is in; None near a dividing line."""
    if any(abs(value - line) < _BORDER for value in shape.centre for line in (1 / 3, 2 / 3)):
        return None
    y, x = shape.centre
    return _REGIONS[int(y * 3)][int(x * 3)]


def sample_count(scene: Scene, rng: np.random.Generator) -> Example:
    """Asks for a number, zeros included, large numbers more often than they come up."""
    labels = (FULL_LABELS, KIND_LABELS, COLOUR_LABELS, (ANY_SHAPE,))[
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
        candidates = _near_misses(scene, labels)
    return count_answer(scene, _choice(rng, candidates))


def sample_colour(scene: Scene, rng: np.random.Generator) -> Example | None:
    """Asks for the colour of a shape whose kind is unique; None if there is none."""
    unique = [found[0] for label in KIND_LABELS if len(found := label.find(scene)) == 1]
    if not unique:
        return None
    shape, word = _choice(rng, unique), _choice(rng, ("colour", "color"))
    return Example(f"answer en what {word} is the {shape.kind}?", shape.colour, "colour")


def sample_where(scene: Scene, rng: np.random.Generator) -> Example | None:
    """Asks for the place of a unique shape; None if none is clearly in one ninth."""
    options = []
    for shape in scene.shapes:
        place = region(shape)
        for label in (Label(shape.colour, shape.kind), Label(None, shape.kind)):
            if place is not None and len(label.find(scene)) == 1:
                options.append((label, place))
    if not options:
        return None
    label, place = _choice(rng, options)
    return Example(f"answer en where is the {label}?", place, "where")


def sample_exists(scene: Scene, rng: np.random.Generator) -> Example:
    """Asks whether something is there: half yes, and most no are near misses."""
    labels = FULL_LABELS if rng.random() < 0.75 else KIND_LABELS
    present = [label for label in labels if label.find(scene)]
    absent = [label for label in labels if not label.find(scene)]
    if present and (rng.random() < 0.5 or not absent):
        return Example(f"answer en is there a {_choice(rng, present)}?", "yes", "exists")
    if rng.random() < 0.75:
        absent = _near_misses(scene, labels)
    return Example(f"answer en is there a {_choice(rng, absent)}?", "no", "exists")


def sample_detect(scene: Scene, rng: np.random.Generator) -> Example:
    """Asks for boxes of one label or several; now and then some or all are not there."""
    draw = rng.random()
    absent = _near_misses(scene, FULL_LABELS if rng.random() < 0.7 else KIND_LABELS)
    if (draw < ABSENT_SHARE or not scene.shapes) and absent:
        return detect_answer(scene, [_choice(rng, absent)])
    form = rng.random()
    if form < 0.12:
        return detect_answer(scene, [ANY_SHAPE])
    wanted = 1 if form < 0.35 else int(rng.integers(2, 4))
    present = [Label(s.colour, s.kind if rng.random() < 0.9 else None) for s in scene.shapes]
    present += [Label(None, shape.kind) for shape in scene.shapes]
    labels: list[Label] = []
    for i in rng.permutation(len(present)).tolist():
        if len(labels) < wanted and not any(map(present[i].overlaps, labels)):
            labels.append(present[i])
    if draw > 1 - ABSENT_SHARE:
        extra = [label for label in absent if not any(map(label.overlaps, labels))]
        if extra:
            labels.insert(int(rng.integers(len(labels) + 1)), _choice(rng, extra))
    return detect_answer(scene, labels)


def sample_segment(scene: Scene, rng: np.random.Generator, codes: MaskCodes) -> Example | None:
    """Asks for the masks of at most two shapes, of one label or two; now and then of none."""
    draw = rng.random()
    if draw < ABSENT_SHARE:
        absent = _near_misses(scene, FULL_LABELS)
        return segment_answer(scene, [_choice(rng, absent)], codes)
    wanted = 1 if draw < 0.7 else 2
    present = [Label(s.colour, s.kind) for s in scene.shapes] * 2
    present += [Label(None, shape.kind) for shape in scene.shapes]
    present += [Label(shape.colour, None) for shape in scene.shapes]
    labels: list[Label] = []
    masks = 0
    for i in rng.permutation(len(present)).tolist():
        label, count = present[i], len(present[i].find(scene))
        if len(labels) < wanted and masks + count <= MOST_MASKS:
            if not any(map(label.overlaps, labels)):
                labels.append(label)
                masks += count
    return segment_answer(scene, labels, codes) if labels else None


Sampler = Callable[[Scene, np.random.Generator], Example | None]
SAMPLERS: dict[str, Sampler] = {
    **{f"caption_{code}": lambda s, _, code=code: caption_answer(s, code) for code in LANGUAGES},
    "count": sample_count,
    "colour": sample_colour,
    "where": sample_where,
    "exists": sample_exists,
    "detect": sample_detect,
    "ocr": lambda scene, _: ocr_answer(scene),
}
TASK_WEIGHTS: dict[str, float] = {
    "caption_en": 0.08, "caption_es": 0.08, "caption_de": 0.08, "caption_fr": 0.08, "count": 0.16,
    "colour": 0.08, "where": 0.08, "exists": 0.08, "detect": 0.2, "ocr": 0.2,
}  # fmt: skip


def fitting_tasks(
    scene: Scene, rng: np.random.Generator, samplers: Mapping[str, Sampler] = SAMPLERS
) -> list[str]:
    """Returns the tasks to ask about a scene: rarely about shapes or text that are not there."""
    unfit: set[str] = set()
    if not scene.shapes and rng.random() >= NO_SHAPE_SHARE:
        unfit |= {"count", "exists", "detect", "segment"}
    if scene.text is None and rng.random() >= NO_TEXT_SHARE:
        unfit.add("ocr")
    return [task for task in samplers if task not in unfit]


def sample_examples(
    scene: Scene,
    rng: np.random.Generator,
    count: int,
    weights: Mapping[str, float] = TASK_WEIGHTS,
    samplers: Mapping[str, Sampler] = SAMPLERS,
) -> list[Example]:
    """Draws `count` examples about a scene, tasks by `weights`, with no prompt twice if possible.

    Args:
      scene: what to ask about.
      rng: where the choices come from.
      count: how many examples to return.
      weights: how often each task is drawn where it fits the scene.
      samplers: what draws an example of each task.
    """
    fitting = fitting_tasks(scene, rng, samplers)
    names = [task for task in fitting if weights.get(task, 0) > 0]
    edges = np.cumsum([weights[name] for name in names])
    distinct: dict[str, Example] = {}
    drawn: list[Example] = []
    while len(distinct) < count and len(drawn) < 8 * count:
        name = names[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
        example = samplers[name](scene, rng)
        if example is None:
            names_left = [other for other in names if other != name]
            if not names_left:
                break
            names, edges = names_left, np.cumsum([weights[other] for other in names_left])
            continue
        drawn.append(example)
        distinct.setdefault(example.prompt, example)
    if not drawn:
        raise ValueError(
            f"None of the tasks {sorted(weights)} fits the scene. Captions fit every scene: give "
            'a task such as "caption_en" a weight above 0.'
        )
    repeats = drawn * (count // len(drawn) + 1)
    return [*distinct.values(), *repeats][:count]


def examples(scene: Scene, rng: np.random.Generator) -> list[Example]:
    """Returns one example of every task that fits the scene, captions in every language."""
    drawn = [SAMPLERS[task](scene, rng) for task in fitting_tasks(scene, rng)]
    return [example for example in drawn if example is not None]


PACKAGE = Path(__file__).resolve().parents[1]


def demo_checkpoint(package: Path = PACKAGE) -> Path:
    """Directory of the demo checkpoint, given that of the package; raises CheckpointError."""
    # A wheel carries checkpoints/ inside the package; a checkout and an editable install have it
    # beside the package, as it stands in the repository.
    places = [parent / "checkpoints" / "demo" for parent in (package, package.parent)]
    for place in places:
        if is_store(place):
            return place
    raise CheckpointError(
        f"The demo checkpoint is neither in {places[0]} nor in {places[1]}. Every wheel and every "
        "whole checkout has it. Install again: pip install --force-reinstall paligemma-jax"
    )
