"""Samplers alone: which token, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.sampling import Greedy, Sampler, Temperature

DRAWS = 20_000
LOGITS = jnp.array([2.0, 1.0, 0.0, -1.0, -30.0])


def keys_of(seeds: jax.Array, step: int = 0) -> jax.Array:
    """Keys as the decode loop makes them."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 1.0, 2.0]])
    tokens = Greedy()(logits, keys_of(jnp.arange(2)))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, [1, 0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_those_of_softmax(temperature: float):
    """Over consecutive seeds, which is what the rows of a batch get."""
    sampler = Temperature(temperature=temperature)
    logits = jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
    tokens = sampler(logits, keys_of(jnp.arange(DRAWS)))
    counts = np.bincount(tokens, minlength=len(LOGITS))
    expected = DRAWS * np.asarray(jax.nn.softmax(LOGITS / temperature))
    likely = expected > 5
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: one in a thousand is above
    assert counts[~likely].sum() <= 5


def test_draws_of_neighbouring_seeds_and_steps_are_independent():
    logits = jnp.zeros((DRAWS, 2))
    tokens = [
        np.asarray(Temperature()(logits, keys_of(jnp.arange(DRAWS), step))) for step in range(2)
    ]
    for first, second in [(tokens[0][:-1], tokens[0][1:]), tokens]:
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / DRAWS**0.5


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_impossible_temperatures(temperature: float):
    with pytest.raises(ConfigError, match="Greedy"):
        Temperature(temperature=temperature)


def test_samplers_are_values():
    """Equal ones share a compiled program."""
    assert Temperature(temperature=0.7) == Temperature(temperature=0.7) != Temperature()
    assert hash(Greedy()) == hash(Greedy())
    assert isinstance(Greedy(), Sampler) and isinstance(Temperature(), Sampler)
