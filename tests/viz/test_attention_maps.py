"""Attention maps over images: in the right place, in colors that everyone can order."""

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.drawing import viridis
from paligemma_jax.errors import InvalidImageError, InvalidPromptError
from paligemma_jax.viz.attention_maps import draw_attention_map, draw_attention_maps

GRAY = Image.new("RGB", (120, 80), (128, 128, 128))


def one_patch(row: int, column: int) -> np.ndarray:
    weights = np.zeros((4, 4), np.float32)
    weights[row, column] = 0.25
    return weights


def test_ends_and_order_of_the_colors(seen):
    colors = viridis(np.linspace(-0.2, 1.2, 71))
    assert colors.dtype == np.uint8 and colors.shape == (71, 3)
    assert colors[0].tolist() == [68, 1, 84] and colors[-1].tolist() == [253, 231, 37]
    lightness = seen(colors[10:-10])[:, 0]
    steps = np.diff(lightness)
    assert (steps > 0).all() and steps.max() < 2.5 * steps.mean()


@pytest.mark.parametrize("row, column", [(0, 0), (1, 2), (3, 0)])
def test_the_hottest_patch_is_where_it_is_in_the_picture(row: int, column: int):
    drawn = draw_attention_map(GRAY, one_patch(row, column))
    assert drawn.size == GRAY.size
    yellow = np.asarray(drawn, int)[..., 1]  # green grows with the weights
    y, x = np.unravel_index(yellow.argmax(), yellow.shape)
    assert row * 20 <= y < (row + 1) * 20 and column * 30 <= x < (column + 1) * 30


def test_ceiling_makes_maps_comparable():
    weak, strong = one_patch(1, 1) / 2, one_patch(1, 1)
    assert draw_attention_map(GRAY, weak) == draw_attention_map(GRAY, strong)
    weak_drawn = draw_attention_map(GRAY, weak, ceiling=0.25)
    assert weak_drawn != draw_attention_map(GRAY, strong, ceiling=0.25)


def test_no_attention_at_all_is_cold_everywhere():
    drawn = np.asarray(draw_attention_map(GRAY, np.zeros((4, 4), np.float32)))
    assert (drawn == drawn[0, 0]).all()


@pytest.mark.parametrize("count", [1, 3])
def test_sheet_has_a_panel_for_each_token(count: int):
    maps = np.stack([[one_patch(t, n) for n in range(count)] for t in range(3)])
    images = [GRAY] * count
    wide = draw_attention_maps(images, maps, ["a", "▁b", "<eos>"], columns=4, panel=400)
    narrow = draw_attention_maps(images, maps, ["a", "▁b", "<eos>"], columns=1, panel=400)
    assert wide.width > 3 * narrow.width and narrow.height > 2 * wide.height
    assert draw_attention_maps(images, maps, ["a", "b", "c"], columns=99).width < 4 * 3 * 260


def test_one_picture_needs_no_list():
    maps = one_patch(0, 0)[None, None]
    assert draw_attention_maps(GRAY, maps, ["a"]) == draw_attention_maps([GRAY], maps, ["a"])


def test_an_answer_without_tokens_is_the_picture_alone():
    assert draw_attention_maps(GRAY, np.zeros((0, 1, 4, 4), np.float32), []).width > 120


def test_numbers_that_do_not_match():
    maps = np.zeros((2, 1, 4, 4), np.float32)
    with pytest.raises(InvalidImageError, match="Expected the 1 images.*got 2"):
        draw_attention_maps([GRAY, GRAY], maps, ["a", "b"])
    with pytest.raises(InvalidPromptError, match="2 maps, got 1"):
        draw_attention_maps(GRAY, maps, ["a"])
