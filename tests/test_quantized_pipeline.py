"""Checkpoints that are quantized while they are read: the demo answers as it does without."""

from pathlib import Path

import jax
import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import held_out_scenes
from paligemma_jax.generation.decode import read_prompts

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"
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
    images = [render(scene, pali.config.img.image_size) for scene in held_out_scenes(count=ROWS)]
    batch = pali.processor(images, PROMPTS)
    whole, found = (
        np.asarray(read_prompts(pipeline.model, batch, room=8)[0]) for pipeline in (pali, rounded)
    )
    np.testing.assert_array_equal(found.argmax(axis=1), whole.argmax(axis=1))
    assert np.abs(found - whole).max() < 0.1 * whole.std()
    answers = [p.generate(images, PROMPTS, max_new_tokens=8) for p in (pali, rounded)]
    same = [one.tokens == other.tokens for one, other in zip(*answers, strict=True)]
    assert sum(same) >= ROWS - 1


@pytest.mark.slow
def test_it_is_saved_and_opened_without_telling(rounded: pg.Pipeline, tmp_path: Path):
    rounded.save(tmp_path / "store", verify=True)
    pg.convert(DEMO, tmp_path / "converted", quantize="int8")
    for path in ("store", "converted"):
        found = pg.from_pretrained(tmp_path / path, dtype="float32")
        assert jax.tree.structure(found.model) == jax.tree.structure(rounded.model)
        jax.tree.map(np.testing.assert_array_equal, found.model, rounded.model)
        assert found.processor.to_dict() == rounded.processor.to_dict()
    same = pg.from_pretrained(tmp_path / "store", dtype="float32", quantize="int8")
    jax.tree.map(np.testing.assert_array_equal, same.model, rounded.model)


def test_what_needs_floats_says_so(rounded: pg.Pipeline, tmp_path: Path):
    store = tmp_path / "store"
    rounded.save(store)
    for ask in (
        lambda: pg.from_pretrained(store, quantize="int4"),
        lambda: pg.from_pretrained(store, adapter="nowhere"),
        lambda: pg.load_model(store),
    ):
        with pytest.raises(pg.CheckpointError, match="already quantized .attention=int8,"):
            ask()
    with pytest.raises(pg.CheckpointError, match="--to huggingface --dequantize"):
        rounded.save(tmp_path / "hf", format="huggingface")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_unknown_recipes_are_refused_before_anything_is_read():
    with pytest.raises(pg.ConfigError, match="'int3'"):
        pg.from_pretrained("nowhere", quantize="int3")
