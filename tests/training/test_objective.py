"""The loss in chunks of columns equals the plain one, in value and gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from paligemma_jax.training.step import (
    example_mean,
    per_example_loss,
    token_mean,
    token_nll,
    weighted_loss,
)

RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(3, 7, 4)), jnp.float32)
TABLE = jnp.asarray(RNG.normal(size=(11, 4)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, 11, (3, 7)))
MASK = jnp.array([[0, 0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]])
ROWS = jnp.array([True, True, True])


def loss(hidden: jax.Array, table: jax.Array, mean: Any = example_mean, **kw: Any) -> jax.Array:
    weights = mean(MASK)
    return weighted_loss(lambda x: x @ table.T, hidden, TARGETS, weights, **kw)


def plain(hidden: jax.Array, table: jax.Array, smoothing: float) -> jax.Array:
    return jnp.mean(per_example_loss(hidden @ table.T, TARGETS, MASK, smoothing))


@pytest.mark.parametrize(
    ("smoothing", "columns", "most"), [(0.0, 32, None), (0.1, 2, None), (0.1, 32, 3), (0.0, 2, 4)]
)
def test_value_and_gradient(smoothing: float, columns: int, most: int | None):
    kw = dict(label_smoothing=smoothing, columns=columns, most=most)

    @jax.jit
    def both(*x: jax.Array) -> Any:
        def of(function: Any) -> Any:
            return jax.value_and_grad(function, argnums=(0, 1))(*x)

        return of(lambda *x: loss(*x, **kw)), of(
            lambda hidden, table: plain(hidden, table, smoothing)
        )

    actual, expected = both(HIDDEN, TABLE)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_mean_over_tokens():
    nll = token_nll(HIDDEN @ TABLE.T, TARGETS)
    wanted = np.sum(np.asarray(nll) * MASK) / MASK.sum()
    np.testing.assert_allclose(loss(HIDDEN, TABLE, token_mean), wanted, rtol=1e-6)


@pytest.mark.parametrize("mean", [example_mean, token_mean])
def test_rows_that_fill_the_batch_do_not_count(mean: Any):
    rows = jnp.array([True, False, True])
    np.testing.assert_allclose(mean(MASK, rows)[::2], mean(MASK[::2]), rtol=1e-6)
    assert not np.asarray(mean(MASK, rows)[1]).any()
    np.testing.assert_allclose(mean(MASK, ROWS), mean(MASK), rtol=1e-6)


def test_more_supervised_tokens_than_there_is_room_for_are_no_loss():
    assert np.isnan(loss(HIDDEN, TABLE, most=2)) and np.isfinite(loss(HIDDEN, TABLE, most=3))


def test_logits_of_all_positions_are_never_held():
    def largest(program: Any) -> int:
        """Entries of the largest array with a vocabulary axis, of any inner program too."""
        found = [0]
        for equation in program.eqns:
            shapes = [v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")]
            found += [int(np.prod(s)) for s in shapes if 11 in s and len(s) > 2]
            found += [largest(sub) for sub in jaxprs_in_params(equation.params)]
        return max(found)

    whole, few = (
        jax.make_jaxpr(jax.grad(lambda *x, c=columns: loss(*x, columns=c), argnums=(0, 1)))(
            HIDDEN, TABLE
        )
        for columns in (7, 2)
    )
    assert largest(whole.jaxpr) == 3 * 7 * 11 and largest(few.jaxpr) == 3 * 2 * 11
