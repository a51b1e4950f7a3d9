"""The demo model looks at what it locates: measured, with the true answers teacher-forced."""

import numpy as np
from PIL import Image

from paligemma_jax import from_pretrained
from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import Shape, held_out_scenes
from paligemma_jax.demo.tasks import FULL_LABELS, detect_answer
from paligemma_jax.generation.attention_maps import attention_to_image

SCENES = 16


def coverage(shape: Shape, side: int) -> np.ndarray:
    """f32[side, side]: the share of each patch that lies in the shape's box."""
    edges = np.linspace(0, 1, side + 1)
    y1, x1, y2, x2 = shape.box

    def along(low: float, high: float) -> np.ndarray:
        inside = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
        return np.clip(inside, 0, None) * side

    return np.outer(along(y1, y2), along(x1, x2))


def test_location_tokens_look_at_their_shape_more_than_elsewhere():
    """Attention per area is at least 1.5 times as high in the box; most is outside all the same."""
    pali = from_pretrained("demo", dtype="float32")
    pictures, asked, shapes = [], [], []
    for scene in held_out_scenes(count=80):
        alone = [label for label in FULL_LABELS if len(label.find(scene)) == 1]
        if len(scene.shapes) > 1 and alone and len(pictures) < SCENES:
            label = alone[len(pictures) % len(alone)]
            pictures.append(Image.fromarray(render(scene, 112)))
            asked.append(detect_answer(scene, [label]))
            shapes.append(label.find(scene)[0])
    assert len(pictures) == SCENES
    answers = [pali.processor.tokenizer.encode(example.answer) for example in asked]
    batch = pali.processor(pictures, [example.prompt for example in asked])
    inside, areas = [], []
    for maps, shape in zip(attention_to_image(pali.model, batch, answers), shapes, strict=True):
        located = maps[:4, 0].sum(axis=0)
        covered = coverage(shape, located.shape[-1])
        inside.append((located * covered).sum() / located.sum())
        areas.append(covered.mean())
    density = np.mean(inside) / np.mean(areas)
    elsewhere = (1 - np.mean(inside)) / (1 - np.mean(areas))
    print(f"inside {np.mean(inside):.3f} of area {np.mean(areas):.3f}, {density / elsewhere:.2f} x")
    assert density / elsewhere > 1.5
