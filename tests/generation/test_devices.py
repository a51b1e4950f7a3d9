"""A model on several devices, whole on each or split over a mesh, answers as on one."""

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
from paligemma_jax.generation.decode import read_prompts
from paligemma_jax.generation.devices import batch_placement, on_devices
from paligemma_jax.generation.generate import generate
from paligemma_jax.models import layers as backend
from paligemma_jax.models.inference_layout import unstack_layers
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.sharding import Axes, local_mesh, make_mesh, shard_model
from tests.generation.meshes import answers, compare, split_everything
from tests.tiny import prompts
from tests.training.runs import write_tiny_store


def test_two_devices_answer_as_one(tiny_model: PaliGemma):
    devices = jax.local_devices()[:2]
    both = on_devices(tiny_model, devices)
    batch = prompts([3, 5, 2, 4], 8)
    logits, cache = read_prompts(both, batch, room=16)
    assert {shard.data.shape[0] for shard in logits.addressable_shards} == {2}
    for leaf in jax.tree.leaves(cache):
        if leaf.ndim > 3:  # keys and values, not one of them whole on both devices
            assert not leaf.is_fully_replicated
    ours = generate(both, batch, max_new_tokens=6)
    theirs = generate(tiny_model, batch, max_new_tokens=6)
    assert [row.tokens for row in ours] == [row.tokens for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(row.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)
    # A row alone cannot be split.
    alone = batch_placement(both)(np.zeros((1, 3)))
    assert alone.is_fully_replicated and alone.sharding.device_set == set(devices)


def test_one_device_changes_nothing(tiny_model: PaliGemma):
    assert on_devices(tiny_model, jax.local_devices()[:1]) is tiny_model
    assert len(batch_placement(tiny_model)(np.zeros(2)).sharding.device_set) == 1
    with pytest.raises(ConfigError, match="at least one device"):
        on_devices(tiny_model, [])


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
    assert batch_placement(two.model)(np.zeros((2, 3))).is_fully_replicated


def test_meshes_that_do_not_fit():
    with pytest.raises(ConfigError, match="got model"):
        local_mesh(jax.make_mesh((2,), ("model",), devices=jax.devices()[:2]))
    with pytest.raises(ConfigError, match="product is 2"):
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
    monkeypatch.setattr(backend, "backend", lambda: "gpu")  # whose matmuls are plain ones
    mesh = make_mesh(Axes(tensor=2), jax.devices()[:2])
    block = shard_model(unstack_layers(tiny_model), mesh).llm.layers[0]
    x = jax.device_put(np.ones((2, 1, 16), np.float32), NamedSharding(mesh, PartitionSpec()))
    program = str(jax.jit(lambda mlp, x: mlp(x)).lower(block.mlp, x).compile().as_text())
    assert "all-reduce" in program and "all-gather" not in program
