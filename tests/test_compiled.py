"""Compiled programs are kept where nobody else asked for something, and never in the way."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import paligemma_jax as pg
from paligemma_jax.loading import enable_compilation_cache

DIRECTORY = "jax_compilation_cache_dir"
LEAST = "jax_persistent_cache_min_compile_time_secs"
ENABLED = "jax_enable_compilation_cache"


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in (DIRECTORY, LEAST, ENABLED)}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update(DIRECTORY, None)
    jax.config.update(ENABLED, True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_loading_a_model_keeps_its_programs(tmp_path: Path):
    pg.load_model("demo")
    directory = Path(getattr(jax.config, DIRECTORY))
    assert directory.is_relative_to(tmp_path / "paligemma-jax") and directory.is_dir()
    assert directory.stat().st_mode & 0o777 == 0o700  # whoever writes there runs code here
    assert getattr(jax.config, LEAST) == 0.0


def test_a_directory_of_the_users_stays(tmp_path: Path):
    jax.config.update(DIRECTORY, str(tmp_path / "mine"))
    jax.config.update(LEAST, 5.0)
    enable_compilation_cache()
    assert getattr(jax.config, DIRECTORY) == str(tmp_path / "mine")
    assert getattr(jax.config, LEAST) == 5.0
    assert not list(tmp_path.iterdir())


def test_turned_off_is_off(tmp_path: Path):
    jax.config.update(ENABLED, False)
    enable_compilation_cache()
    assert getattr(jax.config, DIRECTORY) is None and not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    enable_compilation_cache()
    assert getattr(jax.config, DIRECTORY) is None
