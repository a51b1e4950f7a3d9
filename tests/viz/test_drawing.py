"""Results drawn on images, and words that every font can draw."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from paligemma_jax import Processor
from paligemma_jax.drawing import PALETTE, TagWriter, drawable, ink_on, label_colors, load_font
from paligemma_jax.errors import InvalidImageError
from paligemma_jax.processing.detections import Detections, Segmentations, draw, draw_boxes
from paligemma_jax.processing.location_tokens import Box
from paligemma_jax.processing.masks import RLE
from paligemma_jax.viz.attention_maps import cells_wide, cut, token_labels

BOXES = (
    Box("cat", 0.1, 0.1, 0.6, 0.5),
    Box("a rather long label", 0.1, 0.1, 0.6, 0.5),
    Box("año 日本", 0.0, 0.7, 1.0, 1.0),
    Box("", 0.5, 0.5, 0.5, 0.5),
)
ORANGE = (0xE6, 0x9F, 0x00)


@pytest.mark.parametrize("size", [(1, 1), (20, 12), (224, 224), (1500, 90)])
def test_any_size(size: tuple[int, int]):
    image = Image.new("L", size, 90)
    found = Detections(BOXES, "", *size, (0.9, 0.8, 0.7, 0.6))
    drawn = found.draw(image)
    assert drawn.size == size and drawn.mode == "RGB"
    assert image.getextrema() == (90, 90)
    assert drawn.tobytes() == draw_boxes(image, found).tobytes() != image.convert("RGB").tobytes()


def test_outline_stands_at_the_box():
    drawn = np.asarray(draw(Image.new("RGB", (200, 100)), Detections(BOXES[:1], "", 200, 100)))
    assert tuple(drawn[40, 20]) == ORANGE and tuple(drawn[40, 19]) == (255, 255, 255)
    assert not drawn[40, 30].any() and not drawn[40, 15].any()


def test_masks_are_veiled_and_outlined():
    mask = np.zeros((100, 200), bool)
    mask[20:60, 30:90] = True
    found = Segmentations(BOXES[:1], "", 200, 100, rles=(RLE.from_mask(mask),))
    drawn = np.asarray(draw(Image.new("RGB", (200, 100)), found))
    assert tuple(drawn[40, 30]) == ORANGE and tuple(drawn[40, 29]) == (255, 255, 255)
    np.testing.assert_allclose(drawn[40, 60], np.array(ORANGE) * 0.45, atol=1)
    assert not drawn[80, 60].any()
    empty = Segmentations(BOXES[:1], "", 200, 100, rles=(RLE.from_mask(mask & False),))
    assert empty.draw(Image.new("RGB", (200, 100))).getpixel((60, 40)) == (0, 0, 0)


def test_another_picture_is_refused():
    with pytest.raises(InvalidImageError, match="200 x 100 .*5 x 6"):
        draw_boxes(Image.new("RGB", (5, 6)), Detections(BOXES, "", 200, 100))


def test_one_color_a_label():
    colors = label_colors(["b", "a", "b"])
    assert list(colors) == ["b", "a"] and colors["b"] == ORANGE
    assert len({*label_colors(map(str, range(9))).values()}) == len(PALETTE) == 7
    inks = [ink_on(color) for color in label_colors(PALETTE).values()]
    assert inks == [(0, 0, 0)] * 4 + [(255, 255, 255)] + [(0, 0, 0)] * 2


def test_colors_are_told_apart_by_everybody(seen):
    lab = seen(np.array(list(label_colors(PALETTE).values())))
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)]
    assert min(distances) > 10  # 2.3 is a just noticeable difference


def test_tags_keep_clear_of_one_another():
    writer = TagWriter(ImageDraw.Draw(Image.new("RGB", (300, 300))))
    for _ in range(4):
        writer.write(["cat 0.93"], (50.0, 50.0, 250.0, 250.0), ORANGE)
    areas = writer.areas
    assert len(areas) == 4
    for a, b in itertools.combinations(areas, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert all(min(area) >= 0 and max(area) <= 300 for area in areas)


def test_own_font_shows_other_scripts():
    matplotlib = pytest.importorskip("matplotlib")

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    image = Image.new("RGB", (200, 100))
    found = Detections((Box("año", 0.3, 0.1, 0.6, 0.5),), "", 200, 100)
    assert draw(image, found, font=font).tobytes() != draw(image, found).tobytes()


@pytest.mark.parametrize(
    "text, drawn",
    [("abc", "abc"), ("▁é×…", "_ex..."), ("中", "\\u4e2d"), ("Kreuz ß", "Kreuz \\xdf")],
)
def test_missing_characters_are_replaced(text: str, drawn: str):
    assert drawable(load_font(20), text) == drawn


def test_labels_are_visible(processor: Processor):
    tokens = [2, *processor.tokenizer.encode("red"), *processor.tokenizer.encode("\n"), 1]
    labels = token_labels(processor.tokenizer, tokens)
    assert labels[0] == "<bos>" and labels[-2:] == ("\\n", "<eos>")


@pytest.mark.parametrize(
    "text, width, kept",
    [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("中中", 4, "中中"), ("中中", 3, "中…")],
)
def test_cut(text: str, width: int, kept: str):
    assert cut(text, width) == kept and cells_wide(kept) <= width
