"""Prompts that only training asks: masks as tokens, and a weighted draw of several tasks.

Mask tokens are looked up by shape: encoding every mask anew would hold up training.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from paligemma_jax.demo.render import shape_mask
from paligemma_jax.demo.scene import (
    KINDS,
    MASKS,
    Scene,
    Shape,
    box_around,
    choose,
    extent,
    sample_scene,
    split_rng,
)
from paligemma_jax.demo.tasks import (
    ABSENT_FRACTION,
    FULL_LABELS,
    MOST_MASKS,
    SAMPLERS,
    Example,
    Label,
    Sampler,
    eligible_tasks,
    location_tokens,
    near_misses,
)
from paligemma_jax.processing.masks import MaskCodec, crop_for_codec

MASK_IMAGE_SIZE = 448  # pixels a side of the images that masks are cut from


def codec_crop(shape: Shape) -> np.ndarray:
    """f32[64, 64] in [0, 1]: the mask of a shape, cut to its box as the codec takes it."""
    bins = np.clip(np.round(np.array(shape.box) * 1023), 0, 1023) / 1023
    y1, x1, y2, x2 = bins.tolist()
    return crop_for_codec(shape_mask(shape, MASK_IMAGE_SIZE), (y1, x1, y2, x2))


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
_SIDE = 0.9  # of the image that a mask is drawn in
_Key = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class MaskCodes:
    """Codes by kind, angle to half a degree, and style to a tenth: what a 64 x 64 crop shows."""

    table: Mapping[_Key, tuple[int, ...]]

    def tokens(self, shape: Shape) -> str:
        """The mask of a shape as PaliGemma writes it: sixteen "<seg...>"."""
        codes = self.table[_key(shape.kind, shape.angle, shape.style)]
        return "".join(f"<seg{code:03d}>" for code in codes)


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
                    shape = Shape(kind=kind, color="black", box=box, angle=angle, style=style)
                    crops[key] = codec_crop(shape)
    codes = codec.encode(np.stack(list(crops.values())))
    return MaskCodes(dict(zip(crops, map(tuple, codes.tolist()), strict=True)))


def _key(kind: str, angle: float, style: float) -> _Key:
    turned = 0 if kind == "circle" else round(2 * angle)
    fat = round(10 * style) if kind in ("star", "cross") else 0
    return kind, turned, fat


def segment_answer(scene: Scene, labels: Sequence[Label], codes: MaskCodes) -> Example:
    """Asks for the boxes and masks of one or several labels; what is not there is left out."""
    found = [
        f"{location_tokens(shape)}{codes.tokens(shape)} {label}"
        for label in labels
        for shape in label.find(scene)
    ]
    return Example("segment " + " ; ".join(map(str, labels)), " ; ".join(found), "segment")


def sample_segment(scene: Scene, rng: np.random.Generator, codes: MaskCodes) -> Example | None:
    """Asks for the masks of at most two shapes, of one label or two; now and then of none."""
    draw = rng.random()
    if draw < ABSENT_FRACTION:
        absent = near_misses(scene, FULL_LABELS)
        return segment_answer(scene, [choose(rng, absent)], codes)
    wanted = 1 if draw < 0.7 else 2
    present = [Label(s.color, s.kind) for s in scene.shapes] * 2
    present += [Label(None, shape.kind) for shape in scene.shapes]
    present += [Label(shape.color, None) for shape in scene.shapes]
    labels: list[Label] = []
    masks = 0
    for i in rng.permutation(len(present)).tolist():
        label, count = present[i], len(present[i].find(scene))
        if len(labels) < wanted and masks + count <= MOST_MASKS:
            if not any(map(label.overlaps, labels)):
                labels.append(label)
                masks += count
    return segment_answer(scene, labels, codes) if labels else None


def sample_examples(
    scene: Scene,
    rng: np.random.Generator,
    count: int,
    weights: Mapping[str, float],
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
    fitting = eligible_tasks(scene, rng, samplers)
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
