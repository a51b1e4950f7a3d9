"""Scenes of the demo world: what is in a picture, before anything is drawn."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from paligemma_jax.demo.fonts import FONTS, ink_shape
from paligemma_jax.demo.geometry import Box, apart, box_around, centre, extent
from paligemma_jax.demo.words import WORDS

KINDS: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "green": (36, 158, 58),
    "blue": (34, 82, 222),
    "yellow": (246, 216, 38),
    "purple": (152, 44, 178),
    "black": (16, 16, 18),
    "white": (248, 248, 246),
}
INKS_DARK = ((12, 12, 14), (22, 22, 80), (84, 10, 16), (8, 46, 20), (56, 14, 66))
INKS_BRIGHT = ((252, 252, 250), (255, 236, 90), (150, 240, 255), (255, 212, 216))
PLATES_LIGHT = ((240, 236, 222), (226, 234, 242), (246, 238, 190))
PLATES_DARK = ((24, 30, 46), (22, 46, 34), (58, 22, 26))

SHAPE_COUNT_WEIGHTS = (0.22, 0.26, 0.24, 0.17, 0.11)  # 1..5 shapes
TEXT_ONLY_SHARE, TEXT_SHARE = 0.12, 0.45  # the second includes the first
SIDE_RANGE, CAPITAL_RANGE = (0.14, 0.42), (0.13, 0.22)
MARGIN, GAP, CENTRE_GAP = 0.012, 0.025, 0.05
PLATE_EDGE = 0.03  # how far a sign reaches beyond its text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A coloured shape; `box` is the tight box of its pixels, normalised (y1, x1, y2, x2)."""

    kind: str
    colour: str
    box: Box
    angle: float = 0.0  # degrees, clockwise
    style: float = 0.5  # 0..1, how fat a star or a cross is
    rgb: tuple[int, int, int] = (0, 0, 0)

    @property
    def name(self) -> str:
        """The shape in PaliGemma's words, such as "red circle"."""
        return f"{self.colour} {self.kind}"

    @property
    def centre(self) -> tuple[float, float]:
        """The (y, x) centre of the box."""
        return centre(self.box)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """One written word or number; `box` holds its rotated ink, normalised (y1, x1, y2, x2)."""

    string: str
    box: Box
    font: str
    capital: float  # height of a capital letter, as a share of the picture
    angle: float = 0.0  # degrees, counter-clockwise
    ink: tuple[int, int, int] = (0, 0, 0)
    plate: tuple[int, int, int] | None = None

    @property
    def is_number(self) -> bool:
        """Whether the text is a number (else it is a word)."""
        return self.string.isdigit()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything a picture shows: shapes from left to right, a text or none, and a background."""

    shapes: tuple[Shape, ...]
    text: Text | None
    background: int  # seed of texture and noise

    @property
    def texts(self) -> tuple[Text, ...]:
        """The text, or none."""
        return () if self.text is None else (self.text,)


def _choice(rng: np.random.Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))


def jitter_colour(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    """Returns an RGB near the named colour."""
    r, g, b = np.clip(np.add(COLOURS[colour], rng.integers(-13, 14, 3)), 0, 255).tolist()
    return r, g, b


def _sample_string(rng: np.random.Generator) -> str:
    """Samples a word, or a number of one, two or three digits."""
    if rng.random() < 0.6:
        return _choice(rng, WORDS)
    low, high = ((0, 10), (10, 100), (100, 1000))[int(rng.choice(3, p=(0.2, 0.35, 0.45)))]
    return str(rng.integers(low, high))


def sample_text(rng: np.random.Generator, *, large: bool) -> Text:
    """Samples a word or number with its font, ink and place; `large` lets it fill the picture."""
    low, high = (CAPITAL_RANGE[0], 0.34) if large else CAPITAL_RANGE
    room = 1 - 2 * (MARGIN + PLATE_EDGE)
    while True:
        string, font, angle = _sample_string(rng), _choice(rng, FONTS), float(rng.uniform(-5, 5))
        width, height = ink_shape(font, string)
        sin, cos = abs(math.sin(math.radians(angle))), math.cos(math.radians(angle))
        tall, wide = height * cos + width * sin, width * cos + height * sin  # in capital heights
        if low * wide <= room:  # else too long a word in too broad a font
            break
    capital = float(rng.uniform(low, min(high, room / wide)))
    box_height, box_width = capital * tall, capital * wide
    y = 0.5 + rng.uniform(-0.5, 0.5) * (room - box_height)
    x = 0.5 + rng.uniform(-0.5, 0.5) * (room - box_width)
    dark = rng.random() < 0.5
    ink, plate = _choice(rng, INKS_DARK if dark else INKS_BRIGHT), None
    if rng.random() < 0.3:
        plate = _choice(rng, PLATES_LIGHT if dark else PLATES_DARK)
    box = box_around(float(y), float(x), box_height, box_width)
    return Text(
        string=string, box=box, font=font, capital=capital, angle=angle, ink=ink, plate=plate
    )


def _place_shape(
    rng: np.random.Generator,
    kind: str,
    colour: str,
    placed: list[Shape],
    taken: list[Box],
    largest: float,
) -> Shape | None:
    """Finds a free place for a shape, trying smaller sizes as it goes; None after 24 tries."""
    angle = 0.0 if kind == "circle" else float(rng.uniform(-12, 12))
    style = float(rng.random())
    height, width = extent(kind, angle, style)
    sizes, ys, xs = rng.random((3, 24)).tolist()
    low = math.log(SIDE_RANGE[0])
    for attempt, (size, u, v) in enumerate(zip(sizes, ys, xs, strict=True)):
        high = math.log(max(SIDE_RANGE[0] + 0.01, largest * (1 - attempt / 30)))
        side = math.exp(low + (high - low) * size)
        h, w = height * side, width * side
        y = MARGIN + h / 2 + u * (1 - 2 * MARGIN - h)
        x = MARGIN + w / 2 + v * (1 - 2 * MARGIN - w)
        box = box_around(y, x, h, w)
        if all(apart(box, other, GAP) for other in taken) and all(
            abs(x - other.centre[1]) >= CENTRE_GAP for other in placed
        ):
            return Shape(
                kind=kind, colour=colour, box=box, angle=angle, style=style,
                rgb=jitter_colour(rng, colour),
            )  # fmt: skip
    return None


def _sample_names(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Picks kinds and colours; half of the scenes draw from few, so that things repeat."""
    kinds, colours = list(KINDS), list(COLOURS)
    if rng.random() < 0.5:
        kinds = [kinds[i] for i in rng.permutation(len(kinds))[: int(rng.integers(1, 3))]]
    if rng.random() < 0.5:
        colours = [colours[i] for i in rng.permutation(len(colours))[: int(rng.integers(1, 3))]]
    return [(_choice(rng, kinds), _choice(rng, colours)) for _ in range(count)]


def _place_all(
    rng: np.random.Generator, names: list[tuple[str, str]], text: Text | None
) -> tuple[Shape, ...] | None:
    placed: list[Shape] = []
    taken: list[Box] = []
    if text is not None:
        room = PLATE_EDGE + 0.005 if text.plate is not None else 0.01
        y1, x1, y2, x2 = text.box
        taken.append((y1 - room, x1 - room, y2 + room, x2 + room))
    largest = SIDE_RANGE[1] if len(names) < 4 else 0.36
    for kind, colour in names:
        shape = _place_shape(rng, kind, colour, placed, taken, largest)
        if shape is None:
            return None
        placed.append(shape)
        taken.append(shape.box)
    return tuple(sorted(placed, key=lambda shape: shape.centre[1]))


def sample_scene(
    rng: np.random.Generator, *, max_shapes: int = 5, allow_text: bool = True
) -> Scene:
    """Samples a scene of 0..max_shapes shapes (none only beside a text) that never overlap."""
    draw = rng.random() if allow_text else 1.0
    if draw < TEXT_ONLY_SHARE:
        return Scene(shapes=(), text=sample_text(rng, large=True), background=_seed(rng))
    weights = np.array(SHAPE_COUNT_WEIGHTS[:max_shapes])
    names = _sample_names(rng, 1 + int(rng.choice(max_shapes, p=weights / weights.sum())))
    while True:
        text = sample_text(rng, large=False) if draw < TEXT_SHARE else None
        shapes = _place_all(rng, names, text)
        if shapes is not None:
            return Scene(shapes=shapes, text=text, background=_seed(rng))


def _moved(rng: np.random.Generator, shape: Shape, **changes) -> Shape:
    """Copies a shape with fresh colour jitter, a small shift and perhaps another kind or colour."""
    new = dataclasses.replace(shape, **changes)
    if new.kind == "circle":
        new = dataclasses.replace(new, angle=0.0)
    side = max(shape.box[2] - shape.box[0], shape.box[3] - shape.box[1])
    height, width = extent(new.kind, new.angle, new.style)
    y, x = np.add(shape.centre, rng.uniform(-0.012, 0.012, 2)).tolist()
    box = box_around(y, x, height * side, width * side)
    shift_y = max(0.0, -box[0]) - max(0.0, box[2] - 1)
    shift_x = max(0.0, -box[1]) - max(0.0, box[3] - 1)
    box = (box[0] + shift_y, box[1] + shift_x, box[2] + shift_y, box[3] + shift_x)
    return dataclasses.replace(new, box=box, rgb=jitter_colour(rng, new.colour))


def sample_pair(rng: np.random.Generator) -> tuple[Scene, Scene, bool]:
    """Samples two scenes without text and whether they show the same things at the same places.

    Half of the pairs are the same up to background, noise, colour jitter and shifts of at most
    0.02. Of the others, half are unrelated and half differ in one shape's kind or colour.
    """
    first = sample_scene(rng, max_shapes=3, allow_text=False)
    same = bool(rng.random() < 0.5)
    if not same and rng.random() < 0.5:
        second = sample_scene(rng, max_shapes=3, allow_text=False)
        while [s.name for s in first.shapes] == [s.name for s in second.shapes]:
            second = sample_scene(rng, max_shapes=3, allow_text=False)
        return first, second, False
    changed = -1 if same else int(rng.integers(len(first.shapes)))
    shapes = []
    for i, shape in enumerate(first.shapes):
        changes = {}
        if i == changed and rng.random() < 0.5:
            changes["kind"] = _choice(rng, [k for k in KINDS if k != shape.kind])
        elif i == changed:
            changes["colour"] = _choice(rng, [c for c in COLOURS if c != shape.colour])
        shapes.append(_moved(rng, shape, **changes))
    shapes.sort(key=lambda shape: shape.centre[1])
    return first, Scene(shapes=tuple(shapes), text=None, background=_seed(rng)), same
