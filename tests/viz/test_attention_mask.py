"""Attention masks drawn and folded say what the model does."""

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma_jax import PaliGemmaConfig, Processor
from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.viz.attention_maps import cells_wide
from paligemma_jax.viz.attention_mask import (
    COLORS,
    MIN_CELLS,
    UNSEEN_COLOR,
    Kind,
    MaskToken,
    attention_mask,
    fold,
    visible_fractions,
)
from tests.tiny import tiny_config

SVG = "{http://www.w3.org/2000/svg}"
BOX = "<loc0134><loc0837><loc0293><loc1001> red circle"


def windowed(window: int | None) -> PaliGemmaConfig:
    return tiny_config(sliding_window=window)


def test_rows_of_the_text(processor: Processor):
    view = attention_mask(windowed(None), processor, "detect red", "<loc0134>", length=8)
    drawn = ["│" + line.split("│", 1)[1] for line in str(view).splitlines() if "│" in line]
    assert drawn == [
        "│██│████████│ · ·│ ·",
        "│██│████████│ · ·│ ·",
        "│██│████████│ · ·│ ·",
        "│██│████████│ · ·│ ·",
        "│██│████████│ · ·│ ·",
        "│██│████████│██ ·│ ·",
        "│██│████████│████│ ·",
        "│ ·│ · · · ·│ · ·│ ·",
    ]


def test_prompt_alone_sees_itself_whole(processor: Processor):
    view = attention_mask(windowed(None), processor, "detect red circle")
    assert view.masks[0].all() and not any(token.kind == "answer" for token in view.tokens)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_number_of_images(images: int, processor: Processor):
    view = attention_mask(windowed(None), processor, "caption en", "a", images=images)
    assert sum(token.kind == "image" for token in view.tokens) == 4 * images
    labels = {0: [], 1: ["img×4"], 3: ["img1×4", "img2×4", "img3×4"]}[images]
    assert [word for word in str(view).split() if word.startswith("img")] == labels


def test_window_gives_two_masks_that_differ(processor: Processor):
    view = attention_mask(windowed(4), processor, "detect red circle", BOX, length=20)
    even, odd = view.masks
    assert "last 4 tokens" in view.layers[0] and "whole" in view.layers[1]
    answer = [i for i, token in enumerate(view.tokens) if token.kind == "answer"]
    for place in answer:
        assert np.flatnonzero(even[place]).tolist() == list(range(place - 3, place + 1))
        assert odd[place, : place + 1].all() and not odd[place, place + 1 :].any()
    prefix = slice(0, answer[0])
    assert even[prefix, prefix].all()
    padding = [i for i, token in enumerate(view.tokens) if token.kind == "padding"]
    assert padding and not (even[padding].any() or even[:, padding].any() or odd[padding].any())
    assert "▒▒" not in str(view)


def test_a_window_that_reaches_into_a_picture_sees_some_of_it(processor: Processor):
    view = attention_mask(windowed(7), processor, "detect red", "red")
    assert "▒▒ attends to some of the folded" in str(view)


def test_a_window_longer_than_the_sequence_is_one_mask(processor: Processor):
    view = attention_mask(windowed(4096), processor, "detect red circle", BOX)
    assert len(view.masks) == 1 and "4,096 is longer" in view.layers[0]


@pytest.mark.parametrize("width", [60, 100, 140])
def test_long_sequences_fit_the_terminal(width: int, processor: Processor):
    answer = " ; ".join([BOX] * 12)
    view = attention_mask(windowed(9), processor, "detect " + "red " * 40, answer, images=40)
    panel = [line for line in view.to_text(width).splitlines() if "│" in line or "┼" in line]
    assert max(map(cells_wide, panel)) <= width


def test_svg_can_be_read_and_says_everything(processor: Processor):
    view = attention_mask(windowed(None), processor, "answer en <&\"'> 中 \x07?", "ja\tnein")
    root = ElementTree.fromstring(view.to_svg())
    assert root.get("role") == "img"
    by_id = {element.get("id"): element.text for element in root if element.get("id")}
    assert set(root.get("aria-labelledby", "").split()) == set(by_id) == {"title", "desc"}
    words = [element.text for element in root.iter(f"{SVG}text")]
    for token in view.tokens:
        if token.kind != "image":
            assert words.count(token.label) >= 2  # a row and a column
    titles = [element.text for element in root.iter(f"{SVG}title")]
    assert "image img×4 attends to prompt <bos>" in titles
    assert "prompt <bos> does not attend to answer <eos>" in titles


def test_image_has_the_colors_of_the_legend(processor: Processor):
    view = attention_mask(windowed(None), processor, "detect red", "red", length=8)
    image = view.to_image()
    assert image.mode == "RGB"
    pixels = np.unique(np.asarray(image).reshape(-1, 3), axis=0)
    found = {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in pixels.tolist()}
    assert {*COLORS.values(), UNSEEN_COLOR} <= found


def test_colors_are_told_apart_by_color_blind_people(seen):
    colors = [*COLORS.values(), UNSEEN_COLOR]
    lab = seen(np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colors]))
    for one, other in itertools.combinations(range(len(colors)), 2):
        assert np.linalg.norm(lab[one] - lab[other]) > 12, (colors[one], colors[other])


@pytest.mark.parametrize("ending", [".png", ".svg", ".txt", ".webp"])
def test_save(ending: str, tmp_path: Path, processor: Processor):
    view = attention_mask(windowed(None), processor, "ocr")
    path = tmp_path / f"mask{ending}"
    view.save(path)
    if ending == ".txt":
        assert path.read_text(encoding="utf-8") == f"{view}\n"
    elif ending == ".svg":
        assert path.read_text(encoding="utf-8") == view.to_svg()
    else:
        with Image.open(path) as image:
            assert image.size == view.to_image().size


def test_what_does_not_fit(tmp_path: Path, processor: Processor):
    view = attention_mask(windowed(None), processor, "ocr")
    with pytest.raises(ConfigError, match="ends in .png"):
        view.save(tmp_path / "mask")
    with pytest.raises(InvalidPromptError):
        attention_mask(windowed(None), processor, "detect red circle", BOX, length=3)
    with pytest.raises(ConfigError, match="got -1"):
        attention_mask(windowed(None), processor, "ocr", images=-1)


def sequence(images: int, patches: int, prompt: int, answer: int, padding: int):
    tokens = [MaskToken("image", f"img{n}", n + 1) for n in range(images) for _ in range(patches)]
    parts: list[tuple[Kind, int]]
    parts = [("prompt", prompt), ("answer", answer), ("padding", padding)]
    for kind, count in parts:
        tokens += [MaskToken(kind, f"{kind[0]}{i}") for i in range(count)]
    return tokens


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 12),
    st.integers(1, 5),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(0, 9),
    st.integers(1, 60),
)
def test_cells_hold_each_token_once(images, patches, prompt, answer, padding, most):
    tokens = sequence(images, patches, prompt, answer, padding)
    cells = fold(tokens, most)
    assert [i for cell in cells for i in range(cell.start, cell.stop)] == list(range(len(tokens)))
    assert all(tokens[i].kind == c.kind for c in cells for i in range(c.start, c.stop))
    assert len(cells) <= max(most, MIN_CELLS)
    mask = np.random.default_rng(0).random((len(tokens),) * 2) < 0.5
    seen = visible_fractions(mask, cells)
    sizes = np.array([cell.size for cell in cells], float)
    assert ((seen >= 0) & (seen <= 1)).all()
    np.testing.assert_allclose((seen * np.outer(sizes, sizes)).sum(), mask.sum(), rtol=1e-5)


def test_labels():
    labels = [cell.label for cell in fold(sequence(2, 256, 2, 1, 3), 48)]
    assert labels == ["img1×256", "img2×256", "p0", "p1", "a0", "pad×3"]
    assert [cell.label for cell in fold(sequence(1, 4, 1, 1, 0), 48)] == ["img×4", "p0", "a0"]


@pytest.mark.parametrize("images, prompt, answer", [(60, 3, 3), (1, 60, 3), (1, 3, 60)])
def test_the_longest_part_is_folded_in_its_middle(images: int, prompt: int, answer: int):
    tokens = sequence(images, 2, prompt, answer, 0)
    cells = fold(tokens, 20)
    assert len(cells) == 20
    folded = [cell for cell in cells if cell.size > 2]
    assert len(folded) == 1 and "×" in folded[0].label
    assert cells[0].start == 0 and cells[-1].label == f"a{answer - 1}"
