"""Where arrays lie, and that it changes no number."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from paligemma_jax.config import VARIANTS
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paligemma import abstract_params, flatten
from paligemma_jax.models.sharding import Axes, leaf_sharding, make_mesh, shardings
from tests.training.meshes import train

ROOT = Path(__file__).parents[2]


def fake_mesh(**axes: int) -> Any:
    """A mesh of devices that are not there: enough to ask how arrays would be split."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | axes
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


@functools.cache
def published() -> dict[str, Any]:
    return flatten(abstract_params(VARIANTS["paligemma2-3b-pt-224"]))


def spec(path: str, mesh: Any) -> tuple[Any, ...]:
    return tuple(leaf_sharding(path, published()[path], mesh).spec)


def test_fsdp_splits_the_largest_axis_of_what_is_large():
    mesh = fake_mesh(data=2, fsdp=4)
    assert spec("llm/embedder/input_embedding", mesh) == ("fsdp",)
    assert spec("llm/layers/mlp/gating_einsum/w", mesh) == (None, None, None, "fsdp")
    assert spec("llm/layers/attn/q_einsum/w", mesh) == (None, None, "fsdp")
    assert spec("img/head/kernel", mesh) == (None, "fsdp")
    assert spec("llm/final_norm/scale", mesh) == spec("img/head/bias", mesh) == ()
    # 1152 pixels of width and 4304 of the MLP: 1152 alone goes into 128 parts.
    assert spec("img/blocks/mlp/fc1/kernel", fake_mesh(fsdp=128)) == (None, "fsdp")
    assert spec("img/blocks/mlp/fc1/kernel", fake_mesh(fsdp=7)) == ()


def test_heads_and_mlp_over_tensor_the_rest_over_fsdp():
    mesh = fake_mesh(fsdp=2, tensor=4)
    assert spec("llm/layers/attn/q_einsum/w", mesh) == (None, "tensor", "fsdp")
    assert spec("llm/layers/attn/kv_einsum/w", mesh) == (None, None, "tensor", "fsdp")
    assert spec("llm/layers/attn/attn_vec_einsum/w", mesh) == (None, "tensor", None, "fsdp")
    assert spec("llm/layers/mlp/linear/w", mesh) == (None, "tensor", "fsdp")
    assert spec("img/blocks/attn/q/bias", mesh) == (None, "tensor")
    # Four key heads do not go over eight devices: they stay whole on each.
    assert spec("llm/layers/attn/kv_einsum/w", fake_mesh(tensor=8)) == ()


def test_scales_lie_with_what_they_scale():
    values = jax.ShapeDtypeStruct((26, 2304, 9216), np.int8)

    def specs(groups: int, **axes: int) -> list[tuple[Any, ...]]:
        scale = jax.ShapeDtypeStruct((26, 2304, groups), np.float32)
        name = "llm/layers/mlp/linear/matrix"
        leaves = {f"{name}/values": values, f"{name}/scale": scale}
        return [tuple(found.spec) for found in shardings(leaves, fake_mesh(**axes)).values()]

    # What goes in is split between groups, or where each row has one scale.
    assert specs(144, tensor=4) == [(None, None, "tensor")] * 2
    assert specs(1, tensor=4) == [(None, None, "tensor"), ()]
    assert specs(144, tensor=4, fsdp=2) == [(None, "fsdp", "tensor")] * 2
    # 9 groups do not go over 4 devices: what comes out is split instead.
    assert specs(9, tensor=4) == [(None, "tensor")] * 2


def test_meshes():
    devices = list(range(8))
    assert dict(make_mesh(Axes(data=2, fsdp=-1), jax.devices()[:2]).shape)["fsdp"] == 1
    for axes in (Axes(data=3), Axes(data=-1, fsdp=-1), Axes(fsdp=-1, tensor=3), Axes(data=0)):
        with pytest.raises(ConfigError, match="product is 8"):
            make_mesh(axes, devices)


def assert_same_run(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for a, b in zip(actual["steps"], expected["steps"], strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-5)


@pytest.mark.slow
def test_parts_on_two_devices_compute_what_one_does():
    one, two = train(Axes(), steps=2), train(Axes(fsdp=2), steps=2, accumulation=2)
    assert_same_run(two, one)
    assert one["split"] == 0 and two["split"] > 60


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    known = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return os.environ | {"XLA_FLAGS": " ".join([*known, flags]), "PYTHONPATH": paths}


def start(devices: int, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.training.meshes", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(devices), stdout=pipe, text=True, cwd=ROOT)


def results(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_any_mesh_computes_the_same():
    meshes = [
        {},
        {"data": 2},
        {"fsdp": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ]
    first, *others = results(start(8, *map(json.dumps, meshes)))
    assert len(others) == 3 and first["split"] == others[0]["split"] == 0
    for other in others:
        assert_same_run(other, first)


@pytest.mark.slow
def test_adapters_on_weights_of_few_bits_over_a_mesh():
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    meshes = [{"recipe": recipe, **axes} for recipe in ("int8", "int4") for axes in ({}, mesh)]
    one, other, coarse, other_coarse = results(start(8, *map(json.dumps, meshes)))
    assert_same_run(other, one)
    assert_same_run(other_coarse, coarse)
    assert one["split"] == 0 and min(other["split"], other_coarse["split"]) > 12


@pytest.mark.slow
def test_two_processes_train_together():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    mesh = json.dumps({"data": 2, "fsdp": 2})
    arguments = ("--coordinator", address, mesh, "--process")
    both = [start(2, *arguments, str(number)) for number in range(2)]
    (one,), (other,) = (results(process) for process in both)
    assert one == other and one["split"] > 60
    assert_same_run(one, train(Axes()))
