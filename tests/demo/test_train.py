"""The demo's training at toy size: an interrupted run ends where an uninterrupted one does."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from checkpoints.training import data
from checkpoints.training import train as demo
from checkpoints.training.export import export
from checkpoints.training.prompts import build_mask_codes
from paligemma_jax.loading import from_pretrained
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.training.logging import read_metrics
from paligemma_jax.training.step import TrainStep
from paligemma_jax.weights.mask_vae import mask_vae_bytes

RECIPE = Path(__file__).parents[2] / "checkpoints" / "training" / "demo_config.py"


def toy_recipe() -> demo.Recipe:
    """The committed recipe, shrunk until a step takes a fraction of a second."""
    config = runpy.run_path(str(RECIPE))["get_config"]()
    with config.unlocked():
        config.update(total_steps=6, patch_steps=2, log_every=1, evaluate_every=4)
        config.checkpoint_every = 3
        config.model.img.update(dict(image_size=56, width=16, depth=1, mlp_dim=16, num_heads=2))
        config.model.llm.update(
            dict(width=16, depth=1, mlp_dim=16, num_heads=2, head_dim=8, query_scale=8**-0.5)
        )
        config.batch.update(dict(scenes=2, pairs=1, pages=1))
        config.optimizer.update(dict(warmup_steps=2))
    return demo.Recipe.from_config(config)


@pytest.fixture(scope="module")
def mask_vae():
    return MaskVAE(MaskVAEConfig(embedding_dim=8), rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    mask_vae, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    codes = build_mask_codes(MaskCodec(mask_vae))
    whole = demo.train(toy_recipe(), codes, tmp_path / "whole")
    # Killed after step 4, one after the checkpoint.
    step, calls = TrainStep.__call__, []

    def stop_at_five(*args):
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "__call__", stop_at_five)
        demo.train(toy_recipe(), codes, tmp_path / "stopped")
    state = demo.train(toy_recipe(), codes, tmp_path / "stopped")
    names = ("loss", "patch", "short", "long", "pair", "correct/detect")
    lines = [
        [(line["step"], *map(line.get, names)) for line in read_metrics(path / "metrics.jsonl")]
        for path in (tmp_path / "whole", tmp_path / "stopped")
    ]
    assert lines[0] == lines[1] and len({line[0] for line in lines[0]}) == 7
    assert [line[3] for line in lines[0] if line[1]] != [0.0] * 6  # answers, after the patches
    for path, weight in whole.trainable.items():
        np.testing.assert_array_equal(weight, state.trainable[path])

    codec = tmp_path / "codec.npz"
    codec.write_bytes(mask_vae_bytes(mask_vae))
    assert export(toy_recipe(), tmp_path / "whole", codec, tmp_path / "model") == 6
    pipeline = from_pretrained(tmp_path / "model", dtype="float32")
    expected = np.asarray(whole.trainable["model/img/head/kernel"])
    np.testing.assert_allclose(pipeline.model.img.head.kernel[...], expected, rtol=1e-2)
    assert isinstance(pipeline.caption(np.zeros((30, 30, 3), np.uint8)), str)


@pytest.mark.parametrize("pairs", [False, True])
def test_sheet_of_scenes(pairs: bool):
    sheet = data.scene_sheet(3, 2026, 56, pairs=pairs, boxes=True)
    assert sheet.mode == "RGB" and sheet.height > 112
