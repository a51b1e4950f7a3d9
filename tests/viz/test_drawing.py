"""Words that every font can draw, and labels of tokens."""

import pytest

from paligemma_jax import Processor
from paligemma_jax.drawing import drawable, load_font
from paligemma_jax.viz.attention_maps import cells_wide, cut, token_labels


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
