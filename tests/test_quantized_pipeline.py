"""Checkpoints that are quantized while they are read: the demo answers as it does without."""

from pathlib import Path

import jax
import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.demo.render import render
from paligemma_jax.demo.splits import held_out_scenes
from paligemma_jax.generation.prefix import read_prefix

ROWS = 8
PROMPTS = ["caption en", "detect red circle", "answer en how many shapes are there?", "ocr"] * 2


@pytest.fixture(scope="module")
def pali() -> pg.Pipeline:
    return pg.from_pretrained("demo", dtype="float32")


@pytest.fixture(scope="module")
def rounded() -> pg.Pipeline:
    return pg.from_pretrained("demo", dtype="float32", quantize="int8")


def test_loading_and_quantizing_is_quantizing_what_was_loaded(
    pali: pg.Pipeline, rounded: pg.Pipeline
):
    wanted = pg.quantize(pali.model, pg.Int8())
    assert jax.tree.structure(rounded.model) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, rounded.model, wanted)


def test_the_likeliest_tokens_stay(pali: pg.Pipeline, rounded: pg.Pipeline):
    pictures = [render(scene, pali.config.img.image_size) for scene in held_out_scenes(count=ROWS)]
    batch = pali.processor(pictures, PROMPTS)
    whole, found = (
        np.asarray(read_prefix(pipeline.model, batch, room=8)[0]) for pipeline in (pali, rounded)
    )
    np.testing.assert_array_equal(found.argmax(axis=1), whole.argmax(axis=1))
    assert np.abs(found - whole).max() < 0.1 * whole.std()
    answers = [p.generate(pictures, PROMPTS, max_new_tokens=8) for p in (pali, rounded)]
    same = [one.tokens == other.tokens for one, other in zip(*answers, strict=True)]
    assert sum(same) >= ROWS - 1


def test_it_is_not_saved(rounded: pg.Pipeline, tmp_path: Path):
    with pytest.raises(pg.ConfigError, match="Load it without quantize="):
        rounded.save(tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_unknown_recipes_are_refused_before_anything_is_read():
    with pytest.raises(pg.ConfigError, match="'int3'"):
        pg.from_pretrained("nowhere", quantize="int3")
