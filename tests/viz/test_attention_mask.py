"""Pictures of attention masks say what the model does."""

import dataclasses
import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from paligemma_jax import PaliGemmaConfig, Processor
from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.processing.processor import Batch
from paligemma_jax.viz.attention_maps import cells_wide
from paligemma_jax.viz.attention_mask import (
    COLOURS,
    MASK_DRAWING_UNSEEN,
    attention_mask,
    attention_mask_of,
)
from tests.goldens import big_vision
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


@pytest.mark.parametrize("name", ["pg1", "pg2", "pg1_multi"])
def test_masks_are_the_golden_ones(name: str, processor: Processor):
    """big_vision's own masks, of training and so without padding's."""
    golden = big_vision(name)
    images = golden["image"] if golden["image"].ndim == 5 else golden["image"][:, None]
    text, mask_ar = golden["text"][:, :-1], golden["mask_ar"][:, :-1]
    batch = Batch(images, text, mask_ar, np.ones(text.shape, bool))
    for row in range(len(text)):
        view = attention_mask_of(golden.config, processor.tokenizer, batch, row)
        np.testing.assert_array_equal(view.masks[0], golden["train_attn_mask"][row])


def test_prompt_alone_sees_itself_whole(processor: Processor):
    view = attention_mask(windowed(None), processor, "detect red circle")
    assert view.masks[0].all() and not any(token.kind == "answer" for token in view.tokens)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_number_of_pictures(images: int, processor: Processor):
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
    assert "▒▒ sees some of the folded" in str(view)


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
    assert "image img×4 sees prompt <bos>" in titles
    assert "prompt <bos> does not see answer <eos>" in titles


def test_image_has_the_colours_of_the_legend(processor: Processor):
    view = attention_mask(windowed(None), processor, "detect red", "red", length=8)
    image = view.to_image()
    assert image.mode == "RGB"
    pixels = np.unique(np.asarray(image).reshape(-1, 3), axis=0)
    found = {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in pixels.tolist()}
    assert {*COLOURS.values(), MASK_DRAWING_UNSEEN} <= found


def test_colours_are_told_apart_by_colour_blind_people(seen):
    colours = [*COLOURS.values(), MASK_DRAWING_UNSEEN]
    lab = seen(np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours]))
    for one, other in itertools.combinations(range(len(colours)), 2):
        assert np.linalg.norm(lab[one] - lab[other]) > 12, (colours[one], colours[other])


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
    with pytest.raises(ConfigError, match="does not say what to write"):
        view.save(tmp_path / "mask")
    with pytest.raises(InvalidPromptError):
        attention_mask(windowed(None), processor, "detect red circle", BOX, length=3)
    with pytest.raises(ConfigError, match="-1 pictures"):
        attention_mask(windowed(None), processor, "ocr", images=-1)
    batch = processor(None, ["ocr"])
    with pytest.raises(InvalidPromptError, match="no row 7"):
        attention_mask_of(windowed(None), processor.tokenizer, batch, 7)


def test_view_of_a_batch_is_that_of_its_prompt(processor: Processor):
    batch = dataclasses.replace(processor(None, ["ocr", "detect red circle"]), images=None)
    view = attention_mask_of(windowed(None), processor.tokenizer, batch, 1)
    length = batch.tokens.shape[1]
    wanted = attention_mask(windowed(None), processor, "detect red circle", images=0, length=length)
    assert view.tokens == wanted.tokens
    np.testing.assert_array_equal(view.masks, jnp.asarray(wanted.masks))
