"""Losses by their definition; the goldens of tests/models compare them with big_vision's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.training.step import per_example_loss, token_nll

LOGITS = 3 * jax.random.normal(jax.random.key(0), (2, 4, 7))
TARGETS = jnp.array([[0, 3, 6, 2], [5, 5, 1, 0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_smoothing_spreads_over_the_other_classes(smoothing: float):
    classes = LOGITS.shape[-1]
    wanted = np.full(LOGITS.shape, smoothing / (classes - 1))
    np.put_along_axis(wanted, np.asarray(TARGETS)[..., None], 1 - smoothing, axis=-1)
    expected = -(wanted * np.asarray(jax.nn.log_softmax(LOGITS))).sum(-1)
    np.testing.assert_allclose(token_nll(LOGITS, TARGETS, smoothing), expected, rtol=1e-5)


def test_each_example_is_the_mean_over_its_supervised_tokens():
    mask = jnp.array([[0, 1, 1, 0], [0, 0, 0, 1]])
    nll = np.asarray(token_nll(LOGITS, TARGETS))
    expected = [nll[0, 1:3].mean(), nll[1, 3]]
    np.testing.assert_allclose(per_example_loss(LOGITS, TARGETS, mask), expected, rtol=1e-6)


def test_nothing_supervised_costs_nothing():
    mask = jnp.array([[0, 0, 0, 0], [1, 1, 1, 1]])
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda logits: per_example_loss(logits, TARGETS, mask).sum())
    )(LOGITS)
    assert np.isfinite(loss) and not np.asarray(gradient[0]).any()


def test_losses_are_float32_and_survive_huge_logits():
    logits = (1e4 * LOGITS).astype(jnp.bfloat16)
    nll = token_nll(logits, TARGETS)
    assert nll.dtype == jnp.float32 and np.isfinite(nll).all()


def test_gradient_is_softmax_less_target():
    gradient = jax.jit(jax.grad(lambda logits: token_nll(logits, TARGETS).sum()))(LOGITS)
    wanted = jax.nn.softmax(LOGITS) - jax.nn.one_hot(TARGETS, LOGITS.shape[-1])
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)
