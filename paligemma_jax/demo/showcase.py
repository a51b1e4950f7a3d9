"""A scene that shows what the demo model can do, and the questions to ask about it."""

import dataclasses
import itertools
from collections.abc import Sequence

from paligemma_jax.demo.scene import HELD_OUT, Scene, Shape, sample_scene, split_rng
from paligemma_jax.demo.tasks import (
    KIND_LABELS,
    LANGUAGES,
    Example,
    caption_answer,
    count_answer,
    ocr_answer,
    sample_colour,
    sample_exists,
    sample_where,
)
from paligemma_jax.processing.detections import intersection_over_union
from paligemma_jax.processing.location_tokens import Box

_MAX_LABELS = 3  # kinds of things in the scene; a picture of more is crowded


@dataclasses.dataclass(frozen=True)
class Showcase:
    """A held-out scene of a text and three or more different shapes, and questions with answers.

    `examples` are questions answered in words. `boxes` are what there is of `label`, the commonest
    kind of shape, to detect and to segment.
    """

    scene: Scene
    examples: tuple[Example, ...]
    label: str
    boxes: tuple[Box, ...]

    @property
    def shapes(self) -> list[Shape]:
        """The shapes in `boxes`."""
        return [shape for shape in self.scene.shapes if shape.kind == self.label]


def showcase(seed: int) -> Showcase:
    """The first fitting scene of a seed that no training run has seen; the same every time."""
    for index in itertools.count():
        rng = split_rng(seed, HELD_OUT, index)
        scene = sample_scene(rng)
        names = list(dict.fromkeys(shape.name for shape in scene.shapes))
        if scene.text is None or len(scene.shapes) < 3 or len(names) > _MAX_LABELS:
            continue
        if min(len({s.kind for s in scene.shapes}), len({s.colour for s in scene.shapes})) < 2:
            continue
        common = max(KIND_LABELS, key=lambda label: len(label.find(scene)))
        asked = [
            *[caption_answer(scene, language) for language in LANGUAGES],
            sample_where(scene, rng) or sample_colour(scene, rng) or sample_exists(scene, rng),
            count_answer(scene, common),
            ocr_answer(scene),
        ]
        boxes = [Box(str(common), *shape.box) for shape in common.find(scene)]
        return Showcase(scene, tuple(asked), str(common), tuple(boxes))
    raise AssertionError("unreachable: the scenes do not end")


def questions_without_answers() -> list[str]:
    """What to ask, for answers in words, about a picture whose content nobody has told us."""
    return [
        *[f"caption {language}" for language in LANGUAGES],
        "answer en how many shapes are there?",
        "ocr",
    ]


def boxes_agree(found: Sequence[Box], right: Sequence[Box], least: float = 0.5) -> bool:
    """Whether the two pair off: same label, and an overlap of at least `least` (IoU)."""
    left = list(found)
    for box in right:
        same = [other for other in left if other.label == box.label]
        overlaps = intersection_over_union([box], same)[0]
        if not same or overlaps.max() < least:
            return False
        left.remove(same[int(overlaps.argmax())])
    return not left
