"""A base and an adapter beside it, as a user of PEFT's directories loads them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paligemma_jax as pg
from paligemma_jax.models.inference_layout import unstack_layers
from paligemma_jax.models.paligemma import flatten, to_params
from paligemma_jax.models.quantization import is_quantized


@pytest.fixture(scope="module")
def adapted() -> pg.PaliGemma:
    """The demo model with adapters that do something."""
    model = pg.add_lora(pg.load_model("demo", dtype="float32"), pg.LoRA(rank=2), nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    filled = [
        (path, leaf.replace(jnp.full_like(leaf[...], 0.05)) if path[-1] == "lora_b" else leaf)
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@pytest.fixture(scope="module")
def directory(adapted: pg.PaliGemma, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft") / "adapter"
    pg.save_adapter(adapted, path)
    return path


def test_added_to_the_weights(adapted: pg.PaliGemma, directory: Path):
    found = pg.from_pretrained("demo", dtype="float32", adapter=directory).model
    wanted = flatten(to_params(unstack_layers(pg.merge_lora(adapted))))
    base = flatten(to_params(pg.from_pretrained("demo", dtype="float32").model))
    arrays = flatten(to_params(found))
    assert set(arrays) == set(wanted) == set(base)
    for path, array in arrays.items():
        np.testing.assert_allclose(array, wanted[path], atol=1e-6, err_msg=path)
    changed = [p for p in arrays if not np.array_equal(arrays[p], base[p])]
    assert changed and all(p.startswith("llm/layers/") for p in changed)


def test_rounded_afterwards(adapted: pg.PaliGemma, directory: Path):
    found = pg.from_pretrained("demo", dtype="float32", adapter=directory, quantize="int8").model
    assert is_quantized(found)
    wanted = pg.quantize(unstack_layers(pg.merge_lora(adapted)), "int8")
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(one.dtype, jnp.integer):  # sums in another order may round otherwise
            assert np.mean(np.asarray(one) != np.asarray(other)) < 1e-3


def test_of_another_model(directory: Path, tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    for file in directory.iterdir():
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes()[:-8])
    with pytest.raises(pg.CheckpointError):
        pg.from_pretrained("demo", adapter=tmp_path / "adapter")
