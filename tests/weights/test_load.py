import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paligemma import abstract_params, from_params
from paligemma_jax.weights.load import load_params
from paligemma_jax.weights.tensors import resample_position_embeddings


@pytest.mark.parametrize("dtype", [None, "float32", "float16", jnp.bfloat16])
def test_parameters_fit_the_model(dtype: Any, published: Path, pg2: PaliGemmaConfig):
    config, params = load_params(published / "huggingface", dtype=dtype)
    assert config == pg2
    wanted = abstract_params(config, jnp.dtype(dtype or "bfloat16"))
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    for leaf, abstract in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
    model = from_params(config, params, jnp.float32)
    assert model.config == config


def test_another_resolution(published: Path, pg2: PaliGemmaConfig):
    _, stored = load_params(published / "model.npz")
    config, params = load_params(published / "model.npz", resolution=56)
    assert config.img == dataclasses.replace(pg2.img, image_size=56)
    expected = resample_position_embeddings(np.asarray(stored["img"]["pos_embed"]), 16)
    np.testing.assert_array_equal(params["img"]["pos_embed"], expected)
    same, _ = load_params(published / "model.npz", resolution=28)
    assert same.img == pg2.img


def test_a_resolution_must_fit_the_patches(published: Path):
    with pytest.raises(ValueError, match="image_size 30 is no multiple of patch_size 14"):
        load_params(published / "model.npz", resolution=30)


def test_unknown_dtypes(published: Path):
    with pytest.raises(ConfigError, match="int8 cannot be loaded"):
        load_params(published / "model.npz", dtype="int8")


def test_orbax_is_imported_only_for_stores(published: Path):
    code = (
        "import sys; from paligemma_jax.weights import load_params\n"
        f"load_params({str(published / 'huggingface')!r}); load_params({str(published)!r})\n"
        "assert not {'orbax', 'tensorstore', 'torch', 'safetensors'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
