"""Draws many demo scenes with their boxes and answers onto one picture, to look at them."""

import argparse

import numpy as np
from PIL import Image, ImageDraw

from paligemma_jax.demo.fonts import load_font
from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import Scene, sample_pair
from paligemma_jax.demo.splits import HELD_OUT, PAIRS, held_out_scenes, split_rng
from paligemma_jax.demo.tasks import Example, examples, same_answer

_LINE, _FONT = 11, 9


def _panel(
    pictures: list[np.ndarray], scenes: list[Scene], asked: list[Example], boxes: bool, lines: int
) -> Image.Image:
    size = pictures[0].shape[0]
    panel = Image.new("RGB", (size * len(pictures) + 4, size + lines * _LINE + 4), (255, 255, 255))
    draw = ImageDraw.Draw(panel)
    for i, (picture, scene) in enumerate(zip(pictures, scenes, strict=True)):
        panel.paste(Image.fromarray(picture), (i * size, 0))
        for shape in scene.shapes if boxes else ():
            y1, x1, y2, x2 = (round(value * size) for value in shape.box)
            draw.rectangle((i * size + x1, y1, i * size + x2 - 1, y2 - 1), outline=(255, 0, 255))
    for i, example in enumerate(asked[:lines]):
        answer = "".join(c if c.isalnum() else " " for c in example.answer)
        prompt = "".join(c if c.isalnum() else " " for c in example.prompt).replace("answer en", "")
        text = f"{prompt}  {answer}"[: panel.width // 5]
        draw.text((0, size + 2 + i * _LINE), text, (0, 0, 0), font=load_font("DejaVuSans", _FONT))
    return panel


def contact_sheet(
    count: int = 30, *, seed: int = 2026, size: int = 112, columns: int = 6, zoom: int = 1,
    boxes: bool = True, lines: int = 5, pairs: bool = False,
) -> Image.Image:  # fmt: skip
    """Returns a picture of held-out scenes (or pairs) at `size` pixels, enlarged `zoom` times."""
    panels = []
    for index in range(count):
        if pairs:
            first, second, same = sample_pair(split_rng(seed, HELD_OUT + PAIRS, index))
            scenes, asked = [first, second], [same_answer(same)]
        else:
            scenes = [held_out_scenes(seed, index + 1)[index]]
            asked = examples(scenes[0], split_rng(seed, HELD_OUT, index))
            asked = [e for e in asked if e.task[-2:] not in ("es", "de", "fr")]
        pictures = [
            np.kron(render(scene, size), np.ones((zoom, zoom, 1), np.uint8)) for scene in scenes
        ]
        panels.append(_panel(pictures, scenes, asked, boxes, lines))
    width, height = panels[0].size
    rows = -(-count // columns)
    sheet = Image.new("RGB", (width * columns, height * rows), (255, 255, 255))
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index % columns * width, index // columns * height))
    return sheet


def main() -> None:
    """Writes a contact sheet: python -m paligemma_jax.demo.contact_sheet sheet.png"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="PNG file to write")
    parser.add_argument("--count", type=int, default=30, help="scenes to draw")
    parser.add_argument("--seed", type=int, default=2026, help="held-out seed")
    parser.add_argument("--size", type=int, default=112, help="pixels to render at")
    parser.add_argument("--zoom", type=int, default=2, help="enlargement, pixels stay visible")
    parser.add_argument("--pairs", action="store_true", help="pairs instead of single scenes")
    parser.add_argument("--no-boxes", action="store_true", help="leave the boxes out")
    options = parser.parse_args()
    contact_sheet(
        options.count, seed=options.seed, size=options.size, zoom=options.zoom,
        boxes=not options.no_boxes, pairs=options.pairs,
    ).save(options.target)  # fmt: skip


if __name__ == "__main__":
    main()
