"""Programs that are compiled with options where there is no CPU, and never fail for it."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from paligemma_jax.models import layers
from paligemma_jax.models.layers import Jitted


@pytest.fixture(autouse=True)
def _asks_again() -> Iterator[None]:
    layers._has_options.cache_clear()
    yield
    layers._has_options.cache_clear()


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(layers, "backend", lambda: request.param)
    return request.param


def _programs(function: Jitted) -> list[int]:
    return [getattr(f, "_cache_size")() for f in (function._plain, function._with_options)]  # noqa: B009


def _double(**how: Any) -> Jitted:
    def double(x: jax.Array, times: int = 2) -> jax.Array:
        """Doc."""
        return x * times

    return Jitted(double, **how)


def test_as_jit(device: str):
    twice = _double(static_argnames=("times",))
    assert twice(jnp.ones(3)).tolist() == [2, 2, 2]
    assert twice(jnp.ones(3), times=3).tolist() == [3, 3, 3]
    assert _programs(twice) == ([2, 0] if device == "cpu" else [0, 2])
    assert twice.lower(jnp.ones(3)).compile()(jnp.ones(3)).tolist() == [2, 2, 2]
    assert twice.__doc__ == "Doc."


def test_inside_of_another_function(device: str):
    twice = _double()
    assert jax.jit(lambda x: twice(twice(x)))(jnp.ones(1)) == 4
    assert jax.grad(lambda x: twice(x))(1.0) == 2


def test_options_that_XLA_does_not_know_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layers, "backend", lambda: "gpu")
    monkeypatch.setattr(layers, "_OPTIONS", {"xla_gpu_of_yesterday": True})
    twice = _double()
    assert twice(jnp.ones(1)) == 2
    assert _programs(twice) == [1, 0]
