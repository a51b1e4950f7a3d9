"""The demo's training loop at toy size: an interrupted run ends where an uninterrupted one does."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from checkpoints.training.export import export
from checkpoints.training.prompts import build_mask_codes
from checkpoints.training.train import Recipe, initial_state, restore_state, train
from paligemma_jax.loading import from_pretrained
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.weights.mask_vae import mask_vae_bytes

RECIPE = Path(__file__).parents[2] / "configs" / "demo.py"
pytestmark = pytest.mark.slow


def toy_config(**changes):
    """The committed recipe, shrunk until a step takes a fraction of a second."""
    spec = importlib.util.spec_from_file_location("demo_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.get_config()
    small = dict(total_steps=6, patch_steps=2, log_every=1, evaluate_every=100, checkpoint_every=3)
    with config.unlocked():
        config.update({**small, **changes})
        config.model.img.update(dict(image_size=56, width=16, depth=1, mlp_dim=16, num_heads=2))
        config.model.llm.update(
            dict(width=16, depth=1, mlp_dim=16, num_heads=2, head_dim=8, query_scale=8**-0.5)
        )
        config.batch.update(dict(scenes=2, pairs=1, pages=1))
        config.optimizer.update(dict(warmup_steps=2))
    return Recipe.from_config(config)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def mask_vae():
    return MaskVAE(MaskVAEConfig(embedding_dim=8), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def codes(mask_vae):
    return build_mask_codes(MaskCodec(mask_vae))


@pytest.fixture(scope="module")
def whole(codes, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train(toy_config(), codes, workdir)
    return workdir


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    whole, codes, tmp_path, monkeypatch
):
    # Killed after step 4, one after the state was written.
    import checkpoints.training.train as module

    real = module.train_step
    calls = []

    def stop_at_five(*args, **kwargs):
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "train_step", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        train(toy_config(), codes, tmp_path)
    monkeypatch.setattr(module, "train_step", real)
    train(toy_config(), codes, tmp_path)
    assert losses(tmp_path) == losses(whole)
    with np.load(whole / "state.npz") as a, np.load(tmp_path / "state.npz") as b:
        assert a["step"] == b["step"] == 6
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])


def test_the_exported_model_is_the_trained_one(whole, mask_vae, tmp_path):
    codec = tmp_path / "codec.npz"
    codec.write_bytes(mask_vae_bytes(mask_vae))
    assert export(toy_config(), whole, codec, tmp_path / "model") == 6
    pipeline = from_pretrained(tmp_path / "model", dtype="float32")
    run = initial_state(toy_config(), whole)
    _, (params, _) = restore_state(whole, (run.params, run.opt_state))
    want = np.asarray(params["model"]["img"]["head"]["kernel"])
    np.testing.assert_allclose(pipeline.model.img.head.kernel[...], want, rtol=1e-2)
    picture = np.zeros((30, 30, 3), np.uint8)
    assert isinstance(pipeline.caption(picture), str)
