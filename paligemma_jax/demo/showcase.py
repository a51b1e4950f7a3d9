"""A scene that shows what the demo model can do, and the questions to ask about it."""

import dataclasses
import itertools

from paligemma_jax.demo.scene import HELD_OUT, Scene, Shape, sample_scene, split_rng
from paligemma_jax.demo.tasks import (
    KIND_LABELS,
    LANGUAGES,
    Example,
    caption_answer,
    count_answer,
    ocr_answer,
    sample_color,
    sample_exists,
    sample_where,
)
from paligemma_jax.processing.location_tokens import Box

_MAX_NAMES = 3  # different shapes in the scene; with more, an image is crowded


@dataclasses.dataclass(frozen=True)
class Showcase:
    """A held-out scene of a text and three or more shapes, and questions with answers.

    `examples` are answered in words. `label` is the commonest kind of shape, to detect and to
    segment.
    """

    scene: Scene
    examples: tuple[Example, ...]
    label: str

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that `label` names, from left to right."""
        return [shape for shape in self.scene.shapes if shape.kind == self.label]

    @property
    def boxes(self) -> list[Box]:
        """Their boxes."""
        return [Box(self.label, *shape.box) for shape in self.shapes]


def showcase(seed: int) -> Showcase:
    """The first suitable held-out scene of a seed; the same every time."""
    for index in itertools.count():
        rng = split_rng(seed, HELD_OUT, index)
        scene = sample_scene(rng)
        kinds, colors = {s.kind for s in scene.shapes}, {s.color for s in scene.shapes}
        many = len(scene.shapes) >= 3 and min(len(kinds), len(colors)) >= 2
        if scene.text is None or not many or len({s.name for s in scene.shapes}) > _MAX_NAMES:
            continue
        common = max(KIND_LABELS, key=lambda label: len(label.find(scene)))
        asked = (
            *[caption_answer(scene, language) for language in LANGUAGES],
            sample_where(scene, rng) or sample_color(scene, rng) or sample_exists(scene, rng),
            count_answer(scene, common),
            ocr_answer(scene),
        )
        return Showcase(scene, asked, str(common))
    raise AssertionError("unreachable: the scenes do not end")
