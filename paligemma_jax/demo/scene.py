"""Random scenes of the demo world: colored shapes and a written word or number, before drawing.

Boxes and points are (y, x) in normalized image coordinates. Fonts are DejaVu, cut down to ASCII
letters and digits; their license is fonts/LICENSE_DEJAVU. Training and held-out scenes never share
random numbers.
"""

import dataclasses
import functools
import io
import math
from collections.abc import Sequence
from importlib import resources
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

T = TypeVar("T")
Box = tuple[float, float, float, float]  # y1, x1, y2, x2, each 0..1


def _star(inner: float) -> list[tuple[float, float]]:
    corners = [(1.0 if i % 2 == 0 else inner, math.pi * i / 5) for i in range(10)]
    return [(-radius * math.cos(turn), radius * math.sin(turn)) for radius, turn in corners]


def _cross(a: float) -> list[tuple[float, float]]:
    return [(-1, -a), (-1, a), (-a, a), (-a, 1), (a, 1), (a, a), (1, a), (1, -a), (a, -a), (a, -1),
            (-a, -1), (-a, -a)]  # fmt: skip


@functools.lru_cache(maxsize=1024)
def outline(kind: str, angle: float, style: float) -> np.ndarray:
    """The polygon of a shape with corners, scaled so that its longer bounding-box side is 1.

    Args:
      kind: "square", "triangle", "star" or "cross" (a circle has no corners).
      angle: rotation in degrees, clockwise.
      style: 0..1, how fat a star or a cross is.

    Returns:
      float64[corners, 2] of (y, x), from (0, 0) to the extent of the bounding box.
    """
    points = {
        "square": [(-1.0, -1.0), (-1.0, 1.0), (1.0, 1.0), (1.0, -1.0)],
        "triangle": [(-0.9, 0.0), (0.85, 1.0), (0.85, -1.0)],
        "star": _star(0.40 + 0.08 * style),
        "cross": _cross(0.28 + 0.10 * style),
    }[kind]
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    corners = np.array(points, np.float64) @ rotation
    corners -= corners.min(axis=0)
    return corners / corners.max()


def extent(kind: str, angle: float, style: float) -> tuple[float, float]:
    """Returns (height, width) of a shape's bounding box whose longer side is 1."""
    if kind == "circle":
        return 1.0, 1.0
    height, width = outline(kind, angle, style).max(axis=0)
    return float(height), float(width)


def box_around(y: float, x: float, height: float, width: float) -> Box:
    """The box of a given size around a center."""
    return y - height / 2, x - width / 2, y + height / 2, x + width / 2


def apart(a: Box, b: Box, gap: float) -> bool:
    """Whether two boxes keep at least `gap` between them on some axis."""
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]


WORDS: tuple[str, ...] = tuple(
    """
    ACT ADD AGE AIR ANT APE ARM ART ASK BAG BAR BAT BED BEE BIG BOX BOY BUS CAB CAP CAR CAT
    COW CUP CUT DAY DOG DRY EAR EAT EGG END EYE FAN FAR FIG FIX FLY FOX FUN GAS GEM GUM HAT
    HEN HOT ICE INK JAM JAR JET JOB JOY KEY KID LEG LIP LOG MAP MIX MUD NET NEW NUT OAK OIL
    OLD OWL PAN PEN PET PIE PIG RAT RED ROW RUN SAD SEA SKY SUN TAX TEA TEN TOY VAN WEB WIN
    YES ZIP ZOO
    AREA BABY BACK BALL BANK BEAR BELL BIRD BLUE BOAT BOOK BUSH CAFE CAKE CALM CARD CITY COAT
    COLD COOK DARK DEER DESK DOOR DRUM DUCK EAST EXIT FACE FARM FAST FILM FIRE FISH FLAG FOOD
    FROG GAME GATE GIFT GIRL GOAT GOLD HAND HELP HERO HILL HOME HOPE JAZZ JUMP KING KITE KIWI
    LAKE LAMP LEAF LION LOVE LUCK MAIL MEAL MILK MINT MOON NEST NOTE OPEN OVEN PARK PATH PIPE
    PLUM POND QUIZ RAIN RICE RING ROAD ROCK ROOF ROSE SAIL SALE SALT SHIP SHOP SNOW SOAP SOFA
    SOUP STOP SWIM TAXI TREE VASE WALK WARM WAVE WEST WIND WOLF WOOD YARN ZERO ZONE
    APPLE BEACH BRAVE BREAD BRICK CHAIR CLOCK CLOUD DANCE DREAM EAGLE EARTH FIELD FLUTE FRUIT
    GHOST GRAPE GREEN HAPPY HELLO HORSE HOTEL HOUSE JUICE KOALA LEMON LIGHT LUNCH MAGIC MANGO
    MOUSE MUSIC NIGHT NORTH OCEAN ONION PAPER PEACH PIANO PIZZA PLANT QUEEN QUICK RADIO RIVER
    ROBOT SALAD SHEEP SMILE SOUTH SPOON STONE STORM SUGAR TABLE TIGER TOWER TRAIN TRUCK UNCLE
    VOICE WATCH WATER WHALE WORLD YACHT ZEBRA
    ANCHOR BANANA BASKET BOTTLE BRIDGE BUTTON CAMERA CANDLE CASTLE CHEESE COFFEE DESERT DRAGON
    ENGINE FLOWER FOREST FRIEND GARDEN GUITAR HAMMER ISLAND JACKET JUNGLE KITTEN LADDER MARKET
    MIRROR MONKEY OFFICE ORANGE PENCIL PLANET POCKET RABBIT ROCKET SCHOOL SILVER SPIDER SPRING
    STREET SUMMER TICKET TOMATO TUNNEL TURTLE VALLEY WINDOW WINTER YELLOW
    """.split()
)


FONTS: tuple[str, ...] = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)


@functools.lru_cache(maxsize=32)
def load_font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    """Font `name` (one of FONTS) at an em of `pixels`, read from the package."""
    data = (resources.files("paligemma_jax.demo") / "fonts" / f"{name}.ttf").read_bytes()
    # The basic layout engine is the one that every Pillow build has: images are equal everywhere.
    return ImageFont.truetype(io.BytesIO(data), pixels, layout_engine=ImageFont.Layout.BASIC)


def ink_mask(name: str, string: str, pixels: int) -> Image.Image:
    """An "L" image that holds the ink of `string` and nothing else, em of `pixels`."""
    font = load_font(name, pixels)
    left, top, right, bottom = map(int, font.getbbox(string))  # with the side bearings
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), string, fill=255, font=font)
    return mask.crop(mask.getbbox())


@functools.lru_cache(maxsize=4096)
def ink_shape(name: str, string: str) -> tuple[float, float]:
    """Returns (width, height) of the ink of `string`, in units of the font's capital height."""
    width, height = ink_mask(name, string, 128).size
    capital = ink_mask(name, "H", 128).height
    return width / capital, height / capital


KINDS: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
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
TEXT_ONLY_FRACTION, TEXT_FRACTION = 0.12, 0.45  # the second includes the first
SIDE_RANGE, CAPITAL_RANGE = (0.14, 0.42), (0.13, 0.22)
MARGIN, GAP, CENTER_GAP = 0.012, 0.025, 0.05
PLATE_EDGE = 0.03  # how far a sign reaches beyond its text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A colored shape; `box` is the tight box of its pixels, normalized (y1, x1, y2, x2)."""

    kind: str
    color: str
    box: Box
    angle: float = 0.0  # degrees, clockwise
    style: float = 0.5  # 0..1, how fat a star or a cross is
    rgb: tuple[int, int, int] = (0, 0, 0)

    @property
    def name(self) -> str:
        """The shape in PaliGemma's words, such as "red circle"."""
        return f"{self.color} {self.kind}"

    @property
    def center(self) -> tuple[float, float]:
        """The (y, x) center of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """One written word or number; `box` holds its rotated ink, normalized (y1, x1, y2, x2)."""

    string: str
    box: Box
    font: str
    capital: float  # height of a capital letter, as a fraction of the image
    angle: float = 0.0  # degrees, counter-clockwise
    ink: tuple[int, int, int] = (0, 0, 0)
    plate: tuple[int, int, int] | None = None

    @property
    def is_number(self) -> bool:
        """Whether the text is a number (else it is a word)."""
        return self.string.isdigit()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything an image shows: shapes from left to right, a text or none, and a background."""

    shapes: tuple[Shape, ...]
    text: Text | None
    background: int  # seed of texture and noise

    @property
    def texts(self) -> tuple[Text, ...]:
        """The text, or none."""
        return () if self.text is None else (self.text,)


def choose(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, each equally likely."""
    return items[int(rng.integers(len(items)))]


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))


def jitter_color(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    """An RGB near the named color."""
    r, g, b = np.clip(np.add(COLORS[color], rng.integers(-13, 14, 3)), 0, 255).tolist()
    return r, g, b


def _sample_string(rng: np.random.Generator) -> str:
    """Samples a word, or a number of one, two or three digits."""
    if rng.random() < 0.6:
        return choose(rng, WORDS)
    low, high = ((0, 10), (10, 100), (100, 1000))[int(rng.choice(3, p=(0.2, 0.35, 0.45)))]
    return str(rng.integers(low, high))


def sample_text(rng: np.random.Generator, *, large: bool) -> Text:
    """Samples a word or number with its font, ink and place; `large` lets it fill the image."""
    low, high = (CAPITAL_RANGE[0], 0.34) if large else CAPITAL_RANGE
    room = 1 - 2 * (MARGIN + PLATE_EDGE)
    while True:
        string, font, angle = _sample_string(rng), choose(rng, FONTS), float(rng.uniform(-5, 5))
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
    ink, plate = choose(rng, INKS_DARK if dark else INKS_BRIGHT), None
    if rng.random() < 0.3:
        plate = choose(rng, PLATES_LIGHT if dark else PLATES_DARK)
    box = box_around(float(y), float(x), box_height, box_width)
    return Text(
        string=string, box=box, font=font, capital=capital, angle=angle, ink=ink, plate=plate
    )


def _place_shape(
    rng: np.random.Generator,
    kind: str,
    color: str,
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
            abs(x - other.center[1]) >= CENTER_GAP for other in placed
        ):
            return Shape(
                kind=kind, color=color, box=box, angle=angle, style=style,
                rgb=jitter_color(rng, color),
            )  # fmt: skip
    return None


def _sample_names(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Picks kinds and colors; half of the scenes draw from few, so that things repeat."""
    kinds, colors = list(KINDS), list(COLORS)
    if rng.random() < 0.5:
        kinds = [kinds[i] for i in rng.permutation(len(kinds))[: int(rng.integers(1, 3))]]
    if rng.random() < 0.5:
        colors = [colors[i] for i in rng.permutation(len(colors))[: int(rng.integers(1, 3))]]
    return [(choose(rng, kinds), choose(rng, colors)) for _ in range(count)]


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
    for kind, color in names:
        shape = _place_shape(rng, kind, color, placed, taken, largest)
        if shape is None:
            return None
        placed.append(shape)
        taken.append(shape.box)
    return tuple(sorted(placed, key=lambda shape: shape.center[1]))


def sample_scene(
    rng: np.random.Generator, *, max_shapes: int = 5, allow_text: bool = True
) -> Scene:
    """Samples a scene of 0..max_shapes shapes (none only beside a text) that never overlap."""
    draw = rng.random() if allow_text else 1.0
    if draw < TEXT_ONLY_FRACTION:
        return Scene(shapes=(), text=sample_text(rng, large=True), background=_seed(rng))
    weights = np.array(SHAPE_COUNT_WEIGHTS[:max_shapes])
    names = _sample_names(rng, 1 + int(rng.choice(max_shapes, p=weights / weights.sum())))
    while True:
        text = sample_text(rng, large=False) if draw < TEXT_FRACTION else None
        shapes = _place_all(rng, names, text)
        if shapes is not None:
            return Scene(shapes=shapes, text=text, background=_seed(rng))


def _moved(rng: np.random.Generator, shape: Shape, **changes) -> Shape:
    """Copies a shape with fresh color jitter, a small shift and perhaps another kind or color."""
    new = dataclasses.replace(shape, **changes)
    if new.kind == "circle":
        new = dataclasses.replace(new, angle=0.0)
    side = max(shape.box[2] - shape.box[0], shape.box[3] - shape.box[1])
    height, width = extent(new.kind, new.angle, new.style)
    y, x = np.add(shape.center, rng.uniform(-0.012, 0.012, 2)).tolist()
    box = box_around(y, x, height * side, width * side)
    shift_y = max(0.0, -box[0]) - max(0.0, box[2] - 1)
    shift_x = max(0.0, -box[1]) - max(0.0, box[3] - 1)
    box = (box[0] + shift_y, box[1] + shift_x, box[2] + shift_y, box[3] + shift_x)
    return dataclasses.replace(new, box=box, rgb=jitter_color(rng, new.color))


def sample_pair(rng: np.random.Generator) -> tuple[Scene, Scene, bool]:
    """Samples two scenes without text and whether they show the same things at the same places.

    Half of the pairs are the same up to background, noise, color jitter and shifts of at most
    0.02. Of the others, half are unrelated and half differ in one shape's kind or color.
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
            changes["kind"] = choose(rng, [k for k in KINDS if k != shape.kind])
        elif i == changed:
            changes["color"] = choose(rng, [c for c in COLORS if c != shape.color])
        shapes.append(_moved(rng, shape, **changes))
    shapes.sort(key=lambda shape: shape.center[1])
    return first, Scene(shapes=tuple(shapes), text=None, background=_seed(rng)), same


TRAINING, HELD_OUT = 0, 1
PAIRS, PAGES, MASKS = 2, 4, 6  # added to a split: image pairs, pages to read, masks to encode


def split_rng(seed: int, split: int, index: int) -> np.random.Generator:
    """The generator of item `index` of a split; no other triple shares its stream.

    Raises ValueError for a number that is not in [0, 2**32).
    """
    for name, value in (("seed", seed), ("split", split), ("index", index)):
        if not 0 <= value < 2**32:  # one word of SeedSequence entropy each, so none coincide
            raise ValueError(f"expected 0 <= {name} < 2**32, got {value}")
    return np.random.default_rng(np.random.SeedSequence([seed, split, index]))


def held_out_scenes(seed: int = 2026, count: int = 500) -> list[Scene]:
    """Scenes that no training run can have seen, whatever its seed."""
    return [sample_scene(split_rng(seed, HELD_OUT, index)) for index in range(count)]


def held_out_pairs(seed: int = 2026, count: int = 500) -> list[tuple[Scene, Scene, bool]]:
    """Held-out pairs of scenes, each with whether the two show the same."""
    return [sample_pair(split_rng(seed, HELD_OUT + PAIRS, index)) for index in range(count)]
