"""Samplers alone: which token, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.sampling import (
    Chain,
    Greedy,
    LogitsProcessor,
    MinP,
    Sampler,
    Temperature,
    TopK,
    TopP,
    as_pytree,
    sequence_sampler,
)

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


# Eighths, so that equal logits are common and sums are exact; one size, so that little compiles.
ROW = st.lists(st.integers(-40, 40), min_size=7, max_size=7).map(lambda x: np.array(x) / 8)
SHARE = st.floats(0, 1)
NEARLY = 1e-5  # float32 sums may fall on either side of p


def kept(step: LogitsProcessor, row: np.ndarray) -> np.ndarray:
    """Which tokens are left, bool[V]; those that are have the logits they had."""
    after = np.asarray(step.process(jnp.asarray(row[None], jnp.float32)))[0]
    left = np.isfinite(after)
    np.testing.assert_array_equal(after[left], row[left].astype(np.float32))
    return left


def probabilities(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row - row[np.isfinite(row)].max())
    return weights / weights.sum()


def nucleus(row: np.ndarray, p: float) -> np.ndarray:
    """big_vision's rule, sorted and summed in float64."""
    order = np.argsort(-row, kind="stable")
    sums = np.cumsum(probabilities(row)[order])
    if np.abs(sums[:-1] - p).min() < NEARLY:
        assume(p in (0, 1))
    return row >= row[order][min((sums < p - NEARLY * (p == 1)).sum(), row.size - 1)]


@settings(max_examples=40, deadline=None)
@given(row=ROW, p=SHARE)
@example(row=np.zeros(7), p=0.5)
@example(row=np.array([0.0, -0.0, 1, 1, -1, -1, 2]), p=0.0)
@example(row=np.array([0.0, -0.0, 0, -0.0, -1, -np.inf, -5]), p=0.5)
@example(row=np.array([3.0, 2, 1, 0, -1, -2, -np.inf]), p=0.99)
def test_top_p_is_big_visions(row: np.ndarray, p: float):
    p = min(p, 0.9999)  # p = 1 keeps all, whatever rounding makes of the sum
    np.testing.assert_array_equal(kept(TopP(p=p), row), nucleus(row, p) & np.isfinite(row))


def test_top_p_takes_the_token_that_crosses():
    row = np.log([0.5, 0.25, 0.15, 0.1])
    for p, number in [(0.0, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.91, 4)]:
        assert kept(TopP(p=p), row).sum() == number


def test_top_p_over_a_large_vocabulary():
    """Where no token is likely, and where one has nearly everything."""
    row = np.random.default_rng(0).normal(size=20_000)
    assert kept(TopP(p=0.9), row).sum() == pytest.approx(nucleus(row, 0.9).sum(), rel=1e-3)
    row[77] = 60.0
    assert np.flatnonzero(kept(TopP(p=0.9), row)).tolist() == [77]


@settings(max_examples=25, deadline=None)
@given(row=ROW, k=st.sampled_from([1, 2, 3, 6, 7, 9]))
def test_top_k_keeps_the_k_likeliest_and_equals(row: np.ndarray, k: int):
    least = np.sort(row)[::-1][min(k, row.size) - 1]
    np.testing.assert_array_equal(kept(TopK(k=k), row), row >= least)


@settings(max_examples=40, deadline=None)
@given(row=ROW, p=SHARE)
def test_min_p_keeps_what_is_likely_beside_the_likeliest(row: np.ndarray, p: float):
    shares = probabilities(row) / probabilities(row).max()
    assume(np.abs(shares[shares < 1] - p).min(initial=1) > NEARLY)
    np.testing.assert_array_equal(kept(MinP(p=p), row), shares >= p)


@settings(max_examples=25, deadline=None)
@given(row=ROW, steps=st.permutations([TopK(k=3), TopP(p=0.6), MinP(p=0.3)]))
def test_a_chain_applies_its_steps_in_order(row: np.ndarray, steps: list[LogitsProcessor]):
    expected = row
    for step in [*steps, Temperature(temperature=0.5)]:
        expected = np.asarray(step.process(jnp.asarray(expected[None], jnp.float32)))[0]
    chain = Chain((*steps, Temperature(temperature=0.5)))
    after = np.asarray(chain.process(jnp.asarray(row[None], jnp.float32)))[0]
    np.testing.assert_array_equal(after, expected)


def test_order_in_a_chain_matters():
    row = np.log([0.4, 0.3, 0.2, 0.1])
    cold = Temperature(temperature=0.25)
    before = Chain((cold, TopP(p=0.65)))
    behind = Chain((TopP(p=0.65), cold))
    logits = jnp.asarray(row[None])
    assert np.isfinite(before.process(logits)).sum() == 1
    assert np.isfinite(behind.process(logits)).sum() == 2


FILTERS = [TopK(k=2), TopP(p=0.8), MinP(p=0.2), Chain((Temperature(temperature=2.0), TopK(k=3)))]


@pytest.mark.parametrize("sampler", FILTERS, ids=repr)
def test_draws_are_of_the_kept_tokens_in_their_proportions(sampler: TopK | TopP | MinP | Chain):
    logits = jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
    tokens = sampler(logits, keys_of(jnp.arange(DRAWS)))
    assert tokens.dtype == jnp.int32
    counts = np.bincount(tokens, minlength=len(LOGITS))
    expected = DRAWS * np.asarray(jax.nn.softmax(sampler.process(LOGITS[None])[0]))
    left = expected > 0
    assert 2 <= left.sum() <= 3 and not counts[~left].any()
    assert ((counts - expected)[left] ** 2 / expected[left]).sum() < 13.8  # 2 degrees: 1 in 1000


def test_one_token_left_is_greedy():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 9)), jnp.float32)
    keys = keys_of(jnp.arange(5))
    for sampler in (TopK(k=1), TopP(p=0.0), MinP(p=1.0)):
        np.testing.assert_array_equal(sampler(logits, keys), Greedy()(logits, keys))


def test_a_constraints_ban_holds():
    """Tokens that a constraint ruled out before stay out, also where nothing else is ruled out."""
    logits = jnp.where(jnp.arange(5) == 0, -jnp.inf, LOGITS)[None]
    for sampler in (TopK(k=5), TopP(p=1.0), MinP(p=0.0), *FILTERS):
        assert not np.isfinite(sampler.process(logits)[0, 0])


@pytest.mark.parametrize("value", [-1.0, 1.1, float("nan"), float("inf")])
def test_values_out_of_range(value: float):
    if value != 1.1:
        with pytest.raises(ConfigError, match="temperature: expected"):
            Temperature(temperature=value)
    for make in (TopP, MinP):
        with pytest.raises(ConfigError, match="p: expected a number from 0 to 1"):
            make(p=value)
    with pytest.raises(ConfigError, match="Greedy"):
        Temperature(temperature=0.0)
    with pytest.raises(ConfigError, match="k: expected"):
        TopK(k=0)
    for steps in ((), (TopK(k=2), Greedy())):
        with pytest.raises(ConfigError, match="expected Temperature, TopK"):
            Chain(steps)


def test_samplers_are_values_and_their_numbers_data():
    """Equal ones are equal; other numbers run the same program."""
    assert Temperature(temperature=0.7) == Temperature(temperature=0.7) != Temperature()
    assert Chain([TopK(k=2), MinP(p=0.1)]) == Chain((TopK(k=2), MinP(p=0.1)))
    samplers = [Greedy(), Temperature(), *FILTERS]
    assert len({hash(sampler) for sampler in samplers}) == len(samplers)
    assert all(isinstance(sampler, Sampler) for sampler in samplers)
    run = jax.jit(lambda sampler, logits, keys: sampler(logits, keys))
    for n in range(1, 5):
        chain = Chain((Temperature(temperature=0.3 * n), TopK(k=n), TopP(p=0.2 * n)))
        run(chain, LOGITS[None], keys_of(jnp.arange(1)))
    assert getattr(run, "_cache_size")() == 1  # noqa: B009


def test_each_sequence_has_its_own_values():
    """As the chain of its own values, and greedily where the temperature is 0."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)), jnp.float32)
    keys = keys_of(jnp.arange(4))
    values = [
        (0.0, 3, 0.5, 0.1),
        (0.7, None, None, None),
        (2.0, 5, None, 0.2),
        (1.0, 20, 0.7, None),
    ]
    together = sequence_sampler(*zip(*values, strict=True))(logits, keys)
    for i, (temperature, k, p, least) in enumerate(values):
        one, key = logits[i : i + 1], keys[i : i + 1]
        if not temperature:
            assert together[i] == Greedy()(one, key)[0]
            continue
        steps: list[LogitsProcessor] = [Temperature(temperature=temperature)]
        steps += [] if k is None else [TopK(k=k)]
        steps += [] if p is None else [TopP(p=p)]
        steps += [] if least is None else [MinP(p=least)]
        assert together[i] == Chain(steps)(one, key)[0]
    assert isinstance(sequence_sampler([0, 0.0], [1, 2], [None] * 2, [None] * 2), Greedy)


def test_a_function_is_a_sampler():
    def last(logits: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.full(logits.shape[:1], logits.shape[1] - 1)

    assert jax.jit(lambda s, keys: s(LOGITS[None], keys))(
        as_pytree(last), keys_of(jnp.arange(1))
    ).tolist() == [4]
    chain = Chain((TopK(k=2),))
    assert as_pytree(chain) is chain and isinstance(as_pytree(Greedy()), Greedy)
