"""Checkpoints survive kills, full disks and flipped bits; what comes back is what was saved."""

import multiprocessing
import os
import resource
import signal
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.training.checkpoints import Best, Checkpoints

State = namedtuple("State", ["step", "params", "moments"])


def make_tree(step: int, size: int = 64) -> Any:
    """A tree that is another one at every step, with the dtypes of a run."""
    noise = np.random.default_rng(step).normal(size=(4, size)).astype(np.float32)
    params = {"llm": {"w": jnp.asarray(noise)}, "img": jnp.full(size, step, "bfloat16")}
    return State(jnp.int32(step), params, (jax.tree.map(jnp.ones_like, params), ()))


def require_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def write_steps(directory: Path, *steps: int) -> None:
    with Checkpoints(directory, max_to_keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_tree(step), position=f"at {step}".encode())


def test_what_was_saved_comes_back_although_the_arrays_were_donated_meanwhile(tmp_path: Path):
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = make_tree(7, size=10_000)
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore_latest(state) is None
        checkpoints.save(7, state, position=b"\0\xff", info={"seed": 3}, metrics={"loss": 0.5})
        for _ in range(20):
            state = add(state)
        checkpoints.save(27, state)
    with Checkpoints(tmp_path / "new") as checkpoints:
        latest = checkpoints.restore_latest(state)
        assert latest is not None and latest.step == 27
        require_equal(latest.tree, state)
        first = checkpoints.restore(7, state)
        require_equal(first.tree, make_tree(7, size=10_000))
        assert (first.position, first.info, first.metrics) == (
            b"\0\xff",
            {"seed": 3},
            {"loss": 0.5},
        )


def test_restores_onto_other_devices(tmp_path: Path):
    write_steps(tmp_path, 1)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def place(x: jax.Array) -> jax.ShapeDtypeStruct:
        axes = PartitionSpec("data") if x.ndim and x.shape[0] % 2 == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, axes))

    like = jax.tree.map(place, make_tree(1))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(like)
        assert restored is not None
        require_equal(restored.tree, make_tree(1))
        assert len(restored.tree.params["img"].sharding.device_set) == 2
        checkpoints.save(2, restored.tree)
        checkpoints.wait()
        back = checkpoints.restore_latest(make_tree(1))  # and back onto one
        assert back is not None and back.step == 2
        assert len(back.tree.params["img"].sharding.device_set) == 1
        require_equal(back.tree, make_tree(1))


def flip(directory: Path) -> None:
    path = max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        empty,
        lambda directory: os.truncate(directory / "arrays.json", 5),
        lambda directory: (directory / "MANIFEST.json").write_text("{"),
        lambda directory: (directory / "run.json").unlink(),
    ],
    ids=["flipped bit", "no files", "truncated", "manifest", "missing file"],
)
def test_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path: Path, damage: Any):
    write_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "step_000000003")
    (tmp_path / "99").mkdir()
    (tmp_path / "step_000000004 (copy)").mkdir()
    with Checkpoints(tmp_path, max_to_keep=9) as checkpoints:
        with pytest.warns(UserWarning, match="step 3 is damaged .* step 2 is used"):
            restored = checkpoints.restore_latest(make_tree(0))
        assert restored is not None and restored.step == 2 and restored.position == b"at 2"
        require_equal(restored.tree, make_tree(2))
        assert checkpoints.steps() == [1, 2] and (tmp_path / "damaged_step_000000003").is_dir()
        checkpoints.save(3, make_tree(3))


def test_checkpoint_damaged_again_does_not_replace_the_one_set_aside_before(tmp_path: Path):
    write_steps(tmp_path, 1)
    for number in (1, 2, 3):
        write_steps(tmp_path, 2)
        (tmp_path / "step_000000002" / "run.json").write_text(f"damage {number}")
        with Checkpoints(tmp_path) as checkpoints, pytest.warns(UserWarning, match="damaged"):
            checkpoints.restore_latest(make_tree(0))
    aside = [f"damaged_step_000000002{end}" for end in ("", "_2", "_3")]
    found = [(tmp_path / name / "run.json").read_text() for name in aside]
    assert found == ["damage 1", "damage 2", "damage 3"]


def test_if_all_are_damaged_the_run_does_not_begin_again_in_silence(tmp_path: Path):
    write_steps(tmp_path, 1, 2)
    for step in (1, 2):
        flip(tmp_path / f"step_{step:09d}")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="Every checkpoint .* damaged(.|\n)*step 1: "):
            checkpoints.restore_latest(make_tree(0))
        assert checkpoints.steps() == [1, 2]


def test_keeps_the_newest_and_the_best(tmp_path: Path):
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: float("nan"), 5: 4.5}
    with Checkpoints(tmp_path, max_to_keep=2, best=Best("loss")) as checkpoints:
        assert checkpoints.best_step() is None
        for step, loss in losses.items():
            checkpoints.save(step, make_tree(step), metrics={"loss": loss})
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 4, 5], 2)
    with Checkpoints(tmp_path, max_to_keep=1, best=Best("loss", highest=True)) as checkpoints:
        checkpoints.save(6, make_tree(6))
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step()) == ([5, 6], 5)
    with pytest.raises(ConfigError, match="max_to_keep"):
        Checkpoints(tmp_path, max_to_keep=0)


def test_another_model_is_refused_with_all_differences(tmp_path: Path):
    write_steps(tmp_path, 1)
    other = make_tree(1)
    other.params["img"] = other.params["img"].astype(jnp.float32)
    other.params["more"] = jnp.zeros(2)
    del other.params["llm"]
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore_latest(other)
    message = str(caught.value)
    assert "params/more is missing in the checkpoint, float32[2] here" in message
    assert "params/llm/w is" in message
    assert "params/img is bfloat16[64] in the checkpoint, float32[64] here" in message


def test_names_that_would_be_mixed_up_are_refused(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="'a.b' has a dot"):
            checkpoints.save(1, {"a.b": jnp.zeros(1), "a": {"b": jnp.ones(1)}})
        assert checkpoints.steps() == []


def test_one_run_at_a_time_and_leftovers_of_dead_ones_go(tmp_path: Path):
    for name in (".step_000000001.unfinished", ".step_000000002.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("")
    with Checkpoints(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        with pytest.raises(CheckpointError, match="Another run is writing"):
            Checkpoints(tmp_path)
    Checkpoints(tmp_path).close()


def test_full_disk_is_an_error_at_the_next_step_and_costs_nothing(tmp_path: Path):
    write_steps(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        try:
            checkpoints.save(2, make_tree(2, size=100_000))
            with pytest.raises(CheckpointError, match="step_000000002"):
                for _ in range(1000):
                    checkpoints.check()
                    time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert checkpoints.steps() == [1]
        restored = checkpoints.restore_latest(make_tree(0))
        assert restored is not None
        require_equal(restored.tree, make_tree(1))
        checkpoints.save(2, make_tree(2))  # room was made
    assert [path.name for path in tmp_path.glob("*step*")] == ["step_000000002"]


def _save_for_ever(directory: Path) -> None:
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore_latest(make_tree(0, size=200_000))
        for step in range(restored.step + 1 if restored else 1, 1_000_000):
            checkpoints.save(step, make_tree(step, size=200_000), position=str(step).encode())


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    random = np.random.default_rng(0)
    last = 0
    for _ in range(5):
        process = context.Process(target=_save_for_ever, args=(tmp_path,))
        process.start()
        deadline = time.monotonic() + 60
        while not any(tmp_path.glob(f"step_{last + 1:09d}")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        assert process.pid is not None and process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with Checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore_latest(make_tree(0, size=200_000))
            assert restored is not None and restored.step > last
            last = restored.step
            require_equal(restored.tree, make_tree(last, size=200_000))
            assert restored.position == str(last).encode()
            assert len(checkpoints.steps()) <= 3
