"""Parameters on one device, and straight onto the devices of a mesh."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models import sharding
from paligemma_jax.models.paligemma import abstract_params, flatten, from_params
from paligemma_jax.models.sharding import Axes, leaf_sharding, make_mesh
from paligemma_jax.weights import tensors
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.convert import convert
from paligemma_jax.weights.load import load_params, load_stacked
from paligemma_jax.weights.tensors import FLOATS, TensorSpec, resample_position_embeddings
from tests.weights import reading


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
    with pytest.raises(ValueError, match="image_size 30 is not a multiple of patch_size 14"):
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


TABLE = "llm/embedder/input_embedding"


@pytest.fixture(scope="module")
def checkpoints(published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    store = tmp_path_factory.mktemp("on_mesh") / "store"
    convert(published / "model.npz", store)
    return {"npz": published / "model.npz", "hf": published / "huggingface", "store": store}


@pytest.mark.parametrize("axes", [Axes(fsdp=2), Axes(tensor=2)], ids=["fsdp", "tensor"])
@pytest.mark.parametrize("kind", ["npz", "hf", "store"])
def test_every_device_gets_its_own_shard(
    kind: str, axes: Axes, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    if kind != "store":  # whose own tables are cut otherwise
        monkeypatch.setattr(tensors, "CHUNK_ROWS", 300)
    monkeypatch.setattr(sharding, "MIN_BYTES", 0)  # models of tests are small
    mesh = make_mesh(axes, jax.devices()[:2])

    def placement(name: str, spec: TensorSpec) -> tuple[np.dtype, NamedSharding]:
        return FLOATS["float32"], leaf_sharding(name, spec, mesh)

    expected = flatten(load_params(checkpoints[kind], dtype="float32", resolution=56)[1])
    with open_checkpoint(checkpoints[kind]) as checkpoint:
        found = flatten(load_stacked(checkpoint, resolution=56, placement=placement)[1])
    assert set(found) == set(expected)
    halved = 0
    for name, array in found.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[name]), err_msg=name)
        first, second = array.addressable_shards
        if not array.is_fully_replicated:
            halved += 1
            assert 2 * first.data.nbytes == array.nbytes
            continue
        # Each may be donated by itself.
        ends = {s.data.unsafe_buffer_pointer() for s in (first, second)}
        assert len(ends) == 2, name
    assert halved > 8
    assert found[TABLE].addressable_shards[0].data.shape[0] == 800


@pytest.mark.parametrize("kind", ["npz", "hf", "store"])
def test_slices_of_chunks(kind: str, checkpoints: dict[str, Path]):
    with open_checkpoint(checkpoints[kind]) as checkpoint:
        for name in (TABLE, "llm/layers/mlp/gating_einsum/w", "llm/layers/attn/kv_einsum/w"):
            spec = checkpoint.specs[name]
            whole = checkpoint.read(name, spec.dtype)
            chunk, index = (whole, 0) if name == TABLE else (whole[1], 1)
            part = tuple(slice(n // 2, n) for n in chunk.shape)
            found = checkpoint.read_slice(name, index, part, spec.dtype)
            np.testing.assert_array_equal(found, chunk[part])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "store"])
def test_each_of_two_processes_reads_what_its_devices_hold(
    kind: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tensors, "CHUNK_ROWS", reading.CHUNK_ROWS)
    path = checkpoints[kind]
    if kind == "store":
        path = tmp_path / "store"
        convert(checkpoints["npz"], path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = [str(path), address]
    command = [sys.executable, "-m", "tests.weights.reading", *arguments]
    root = Path(__file__).parents[2]
    paths = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    flags = os.environ["XLA_FLAGS"]  # two devices each
    both = [
        subprocess.Popen(
            [*command, str(number)],
            env=os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for number in range(2)
    ]
    expected = flatten(load_params(path, dtype="float32")[1])
    total = sum(array.nbytes for array in expected.values())
    for process in both:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        found = json.loads(out.splitlines()[-1])
        assert found["wrong"] == []
        if kind == "hf":  # small arrays are whole on every device
            assert total * 0.45 < found["read"] < total * 0.6
        else:  # of a layer, all is verified, and of the table, what is its own
            assert found["read"] < total * 0.7
