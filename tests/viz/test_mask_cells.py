"""Folding keeps every token and every count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.viz.attention_mask import FEWEST_CELLS, Kind, MaskToken, fold, shares


def sequence(pictures: int, patches: int, prompt: int, answer: int, padding: int):
    tokens = [MaskToken("image", f"img{n}", n + 1) for n in range(pictures) for _ in range(patches)]
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
def test_cells_hold_each_token_once(pictures, patches, prompt, answer, padding, most):
    tokens = sequence(pictures, patches, prompt, answer, padding)
    cells = fold(tokens, most)
    assert [i for cell in cells for i in range(cell.start, cell.stop)] == list(range(len(tokens)))
    assert all(tokens[i].kind == c.kind for c in cells for i in range(c.start, c.stop))
    assert len(cells) <= max(most, FEWEST_CELLS)
    mask = np.random.default_rng(0).random((len(tokens),) * 2) < 0.5
    seen = shares(mask, cells)
    sizes = np.array([cell.size for cell in cells], float)
    assert ((seen >= 0) & (seen <= 1)).all()
    np.testing.assert_allclose((seen * np.outer(sizes, sizes)).sum(), mask.sum(), rtol=1e-5)


def test_labels():
    labels = [cell.label for cell in fold(sequence(2, 256, 2, 1, 3), 48)]
    assert labels == ["img1×256", "img2×256", "p0", "p1", "a0", "pad×3"]
    assert [cell.label for cell in fold(sequence(1, 4, 1, 1, 0), 48)] == ["img×4", "p0", "a0"]


@pytest.mark.parametrize("pictures, prompt, answer", [(60, 3, 3), (1, 60, 3), (1, 3, 60)])
def test_the_longest_part_is_folded_in_its_middle(pictures: int, prompt: int, answer: int):
    tokens = sequence(pictures, 2, prompt, answer, 0)
    cells = fold(tokens, 20)
    assert len(cells) == 20
    folded = [cell for cell in cells if cell.size > 2]
    assert len(folded) == 1 and "×" in folded[0].label
    assert cells[0].start == 0 and cells[-1].label == f"a{answer - 1}"
