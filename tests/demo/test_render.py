"""Images show what scenes say: same every time, at every size, boxes tight."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import COLORS, FONTS, KINDS, Scene, Shape, held_out_scenes, ink_mask


def without(scene: Scene, shape: Shape) -> Scene:
    return dataclasses.replace(scene, shapes=tuple(s for s in scene.shapes if s is not shape))


def test_same_scene_same_image():
    scene = held_out_scenes(1, 1)[0]
    image = render(scene, 112)
    assert image.shape == (112, 112, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, render(scene, 112))
    other = dataclasses.replace(scene, background=scene.background ^ 1)
    assert np.any(image != render(other, 112))


@pytest.mark.parametrize("size", [112, 224, 448])
def test_boxes_are_tight_to_the_pixel(size: int):
    for scene in held_out_scenes(4, 25):
        image = render(scene, size)
        for shape in scene.shapes:
            changed = np.any(image != render(without(scene, shape), size), axis=-1)
            ys, xs = np.nonzero(changed)
            seen = np.array([ys.min(), xs.min(), ys.max() + 1, xs.max() + 1])
            assert np.abs(seen - np.array(shape.box) * size).max() < 1.5


def test_text_stays_in_its_box():
    for scene in held_out_scenes(4, 60):
        if scene.text is None:
            continue
        scene = dataclasses.replace(scene, text=dataclasses.replace(scene.text, plate=None))
        blank = dataclasses.replace(scene, text=None)
        ys, xs = np.nonzero(np.any(render(scene, 112) != render(blank, 112), axis=-1))
        y1, x1, y2, x2 = (value * 112 for value in scene.text.box)  # pyright: ignore
        assert y1 - 1 <= ys.min() < y1 + 4 and x1 - 1 <= xs.min() < x1 + 4
        assert y2 - 4 < ys.max() + 1 <= y2 + 1 and x2 - 4 < xs.max() + 1 <= x2 + 1


def test_every_size_shows_the_same():
    for scene in held_out_scenes(6, 12):
        small, large = render(scene, 112), render(scene, 448)
        reduced = np.asarray(Image.fromarray(large).reduce(4))
        difference = np.abs(small.astype(int) - reduced).mean()
        assert difference < 6  # grain is smoother after the reduction, nothing else differs


@pytest.mark.parametrize("color", COLORS)
def test_every_color_stands_out(color: str):
    box = (0.3, 0.3, 0.7, 0.7)
    for background in range(25):
        shape = Shape(kind="square", color=color, box=box, rgb=COLORS[color])
        scene = Scene(shapes=(shape,), text=None, background=background)
        inside = render(scene, 112)[36:76, 36:76].reshape(-1, 3).mean(axis=0)
        outside = render(without(scene, shape), 112)[36:76, 36:76].reshape(-1, 3).mean(axis=0)
        nearest = min(COLORS, key=lambda name: float(np.abs(inside - COLORS[name]).sum()))
        assert nearest == color
        assert np.linalg.norm(inside - outside) > 60


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_fill_their_usual_share(kind: str):
    shape = Shape(kind=kind, color="white", box=(0.2, 0.2, 0.8, 0.8), rgb=(255, 255, 255))
    scene = Scene(shapes=(shape,), text=None, background=0)
    changed = np.any(render(scene, 224) != render(without(scene, shape), 224), axis=-1).sum()
    shares = {"circle": 0.785, "square": 1.0, "triangle": 0.44, "star": 0.36, "cross": 0.55}
    assert changed / (0.6 * 224) ** 2 == pytest.approx(shares[kind], abs=0.08)


@pytest.mark.parametrize("font", FONTS)
def test_fonts_have_every_letter_and_digit(font: str):
    glyphs = {ink_mask(font, c, 64).tobytes() for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"}
    assert len(glyphs) == 36
