"""The demo checkpoint is found wherever an installation puts it."""

from pathlib import Path

import pytest

from paligemma_jax.errors import CheckpointError
from paligemma_jax.loading import demo_checkpoint


def make_store(directory: Path) -> Path:
    (directory / "params").mkdir(parents=True)
    return directory


def test_found_inside_an_installed_package(tmp_path: Path):
    package = tmp_path / "site-packages" / "paligemma_jax"
    inside = make_store(package / "checkpoints" / "demo")
    make_store(tmp_path / "site-packages" / "checkpoints" / "demo")  # somebody else's
    assert demo_checkpoint(package) == inside


def test_found_beside_the_package_in_a_checkout(tmp_path: Path):
    package = tmp_path / "paligemma_jax"
    beside = make_store(tmp_path / "checkpoints" / "demo")
    assert demo_checkpoint(package) == beside


def test_missing_one_is_one_clear_error(tmp_path: Path):
    (tmp_path / "checkpoints" / "demo").mkdir(parents=True)
    (tmp_path / "checkpoints" / "demo" / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match="found neither.*pip install"):
        demo_checkpoint(tmp_path / "paligemma_jax")


def test_found_here():
    assert {"config.json", "tokenizer.model"} <= {p.name for p in demo_checkpoint().iterdir()}
