"""Weights read straight onto the devices of a mesh are those read whole."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from paligemma_jax.models.paligemma import flatten
from paligemma_jax.models.sharding import RULES, Axes, Fsdp, leaf_sharding, make_mesh
from paligemma_jax.weights import huggingface
from paligemma_jax.weights import load as on_mesh
from paligemma_jax.weights import tensors as boxes
from paligemma_jax.weights import tensors as pieces
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.convert import convert
from paligemma_jax.weights.load import load_params, with_resolution
from paligemma_jax.weights.tensors import FLOATS, TensorSpec, read_boxes
from tests.weights import reading

SPLIT = dataclasses.replace(
    RULES,
    rules=tuple(
        (pattern, tuple(Fsdp(small=0) if isinstance(x, Fsdp) else x for x in layouts))
        for pattern, layouts in RULES.rules
    ),
)
TABLE = "llm/embedder/input_embedding"


@pytest.fixture(scope="module")
def checkpoints(published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    store = tmp_path_factory.mktemp("on_mesh") / "store"
    convert(published / "model.npz", store)
    return {"npz": published / "model.npz", "hf": published / "huggingface", "store": store}


def load(path: Path, axes: Axes, resolution: int | None = None) -> dict[str, jax.Array]:
    mesh = make_mesh(axes, jax.devices()[:2])

    def wanted(name: str, spec: TensorSpec) -> tuple[np.dtype, NamedSharding]:
        return FLOATS["float32"], leaf_sharding(name, spec, mesh, SPLIT)

    with open_checkpoint(path) as checkpoint:
        config = with_resolution(checkpoint.config, resolution)
        return flatten(on_mesh.load_on_mesh(checkpoint, config, wanted))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("kind", ["npz", "hf", "store"])
def test_every_device_gets_its_own_shard(
    kind: str, joined: bool, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    if kind != "store":  # whose own tables are cut otherwise
        monkeypatch.setattr(pieces, "TABLE_ROWS", 300)
    if joined:  # as on accelerators
        monkeypatch.setattr(on_mesh, "_share_memory", lambda sharding: False)
    expected = flatten(load_params(checkpoints[kind], dtype="float32", resolution=56)[1])
    found = load(checkpoints[kind], Axes(tensor=2) if joined else Axes(fsdp=2), 56)
    assert set(found) == set(expected)
    halved = 0
    for name, array in found.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[name]), err_msg=name)
        first, second = array.addressable_shards
        if not array.is_fully_replicated:
            halved += 1
            assert 2 * first.data.nbytes == array.nbytes
            continue
        # Each may be given away by itself.
        ends = {s.data.unsafe_buffer_pointer() for s in (first, second)}
        assert len(ends) == 2, name
    assert halved > (8 if joined else 30)
    assert found[TABLE].addressable_shards[0].data.shape[0] == 800


class Held:
    """Bytes of arrays that are being filled on the host, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = np.empty(shape, dtype)
        self._count(array.nbytes)
        weakref.finalize(array, self._count, -array.nbytes)
        return array[...]

    def _count(self, size: int) -> None:
        self.now += size
        self.most = max(self.now, self.most)


@pytest.mark.parametrize("kind", ["hf", "npz"])
def test_a_host_holds_a_piece_at_a_time(
    kind: str, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pieces, "TABLE_ROWS", 100)
    held = Held()
    for module in (boxes, huggingface, on_mesh):
        monkeypatch.setattr(module, "aligned_empty", held.empty)
    mesh = make_mesh(Axes(fsdp=2), jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    with open_checkpoint(checkpoints[kind]) as checkpoint:
        array = on_mesh.put_and_join(checkpoint, TABLE, FLOATS["float32"], sharding)
    assert array.nbytes == 16 * array.shape[0] * 4 == 16 * 100 * 4 * 16
    # A piece, and its two parts on their way to the devices.
    assert held.now == 0 and held.most == 2 * 100 * 16 * 4


@pytest.mark.parametrize("kind", ["hf", "store"])
def test_parts_of_pieces(kind: str, checkpoints: dict[str, Path]):
    with open_checkpoint(checkpoints[kind]) as checkpoint:
        for name in (TABLE, "llm/layers/mlp/gating_einsum/w", "llm/layers/attn/kv_einsum/w"):
            spec = checkpoint.specs[name]
            whole = checkpoint.read(name, spec.dtype)
            shape = spec.shape if name == TABLE else spec.shape[1:]
            box = tuple(slice(n // 2, n) for n in shape)
            wanted = [box] if name == TABLE else [None, box]
            *before, found = read_boxes(checkpoint, name, wanted, spec.dtype)
            expected = whole if name == TABLE else whole[1]
            assert found is not None and all(x is None for x in before)
            np.testing.assert_array_equal(found, expected[box])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "store"])
def test_each_of_two_processes_reads_what_its_devices_hold(
    kind: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pieces, "TABLE_ROWS", reading.TABLE_ROWS)
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
