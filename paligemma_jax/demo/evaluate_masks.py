"""Masks of held-out scenes, pixel by pixel in the picture."""

from collections.abc import Sequence

import numpy as np

from paligemma_jax.demo.render import shape_mask
from paligemma_jax.demo.scene import Scene
from paligemma_jax.demo.splits import HELD_OUT, split_rng
from paligemma_jax.demo.tasks import MOST_MASKS
from paligemma_jax.pipeline import Pipeline


def segment_all(
    pipeline: Pipeline, scenes: Sequence[Scene], pictures: Sequence[np.ndarray], seed: int
) -> tuple[float, int]:
    """Mean IoU in 0..1 over objects, and the number of prompts: one a scene with shapes.

    Asks for one of the names in the scene that at most two shapes have. Found and right masks are
    paired, best first; what has no partner, on either side, counts 0.
    """
    asked = []
    for i, scene in enumerate(scenes):
        names = sorted(shape.name for shape in scene.shapes)
        fitting = [name for name in dict.fromkeys(names) if names.count(name) <= MOST_MASKS]
        if fitting:
            rng = split_rng(seed + 2, HELD_OUT, i)
            asked.append((i, fitting[int(rng.integers(len(fitting)))]))
    answers = pipeline.segment_batch(
        [pictures[i] for i, _ in asked],
        [[name] for _, name in asked],
        max_new_tokens=64,
        batch_size=64,
    )
    overlaps: list[float] = []
    for (i, name), found in zip(asked, answers, strict=True):
        size = pictures[i].shape[0]
        right = [shape_mask(shape, size) for shape in scenes[i].shapes if shape.name == name]
        overlaps += paired_overlaps(found.masks, np.stack(right))
    return float(np.mean(overlaps)), len(asked)


def paired_overlaps(found: np.ndarray, right: np.ndarray) -> list[float]:
    """IoU of each pair of masks bool[n, H, W] and bool[m, H, W], best first; max(n, m) numbers."""
    shared = np.einsum("nhw,mhw->nm", found.astype(np.float32), right.astype(np.float32))
    areas = found.sum(axis=(1, 2))[:, None] + right.sum(axis=(1, 2))[None]
    iou = shared / np.maximum(areas - shared, 1)
    overlaps = []
    for _ in range(min(iou.shape)):
        n, m = np.unravel_index(int(np.argmax(iou)), iou.shape)
        overlaps.append(max(0.0, float(iou[n, m])))
        iou[n, :] = iou[:, m] = -1
    return overlaps + [0.0] * (max(len(found), len(right)) - len(overlaps))
