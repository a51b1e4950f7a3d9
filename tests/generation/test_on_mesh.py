"""A model over a mesh answers as it does on one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import paligemma_jax as pg
from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.devices import by_rows
from paligemma_jax.models import layers as backend
from paligemma_jax.models.inference_layout import unstack_layers
from paligemma_jax.models.sharding import Axes, local_mesh, make_mesh, shard_model
from tests.generation.meshes import answers, compare, split_everything
from tests.training.runs import write_tiny_store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_store(tmp_path_factory.mktemp("mesh") / "store")


def test_two_devices_share_the_weights(store: Path, monkeypatch: pytest.MonkeyPatch):
    split_everything(monkeypatch.setattr)
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    one = pg.from_pretrained(store, dtype="float32")
    two = pg.from_pretrained(store, dtype="float32", mesh=mesh)
    compare(answers(one, few=True), answers(two, few=True))
    leaves = jax.tree.leaves(two.model)
    whole = sum(leaf.nbytes for leaf in leaves)
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert own < 0.55 * whole
    assert by_rows(two.model)(np.zeros((2, 3))).is_fully_replicated


def test_meshes_that_do_not_fit():
    with pytest.raises(ConfigError, match="over the axis model of a mesh"):
        local_mesh(jax.make_mesh((2,), ("model",), devices=jax.devices()[:2]))
    with pytest.raises(ConfigError, match="does not go with 2 devices"):
        local_mesh(Axes(tensor=3))
    turned = jax.make_mesh((2, 1), ("tensor", "data"), devices=jax.devices()[:2])
    assert dict(local_mesh(turned).shape) == {"data": 1, "fsdp": 1, "tensor": 2}


@pytest.mark.slow
def test_any_mesh_answers_the_same(store: Path):
    flags = "--xla_force_host_platform_device_count=8"
    known = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = os.environ | {"XLA_FLAGS": " ".join([*known, flags]), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "tests.generation.meshes", str(store)]
    out = subprocess.run(command, check=True, env=env, text=True, stdout=subprocess.PIPE, cwd=ROOT)
    assert json.loads(out.stdout.splitlines()[-1]) == {"same": 7}


def test_weights_of_the_mlp_are_not_gathered(
    monkeypatch: pytest.MonkeyPatch, tiny_model: pg.PaliGemma
):
    monkeypatch.setattr(backend, "backend", lambda: "gpu")  # whose products are plain ones
    mesh = make_mesh(Axes(tensor=2), jax.devices()[:2])
    block = shard_model(unstack_layers(tiny_model), mesh).llm.layers[0]
    x = jax.device_put(np.ones((2, 1, 16), np.float32), NamedSharding(mesh, PartitionSpec()))
    program = str(jax.jit(lambda mlp, x: mlp(x)).lower(block.mlp, x).compile().as_text())
    assert "all-reduce" in program and "all-gather" not in program
