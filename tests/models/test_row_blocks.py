"""Products a block of rows at a time are those of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models import layers as row_blocks
from paligemma_jax.models.layers import in_row_blocks


@pytest.mark.parametrize("count", [1, 64, 128, 130, 700])
def test_blocks(monkeypatch: pytest.MonkeyPatch, count: int):
    monkeypatch.setattr(row_blocks, "BLOCK", 128 * 5)
    rng = np.random.default_rng(0)
    w, scale = rng.normal(size=(count, 5)), rng.normal(size=(count, 1))
    x = rng.normal(size=(3, 5))
    sizes = []

    def product(w: jax.Array, scale: jax.Array) -> jax.Array:
        sizes.append(len(w))
        return w @ x.T * scale

    y = in_row_blocks(product, jnp.asarray(w), jnp.asarray(scale), columns=5)
    np.testing.assert_allclose(y, w @ x.T * scale, rtol=1e-4, atol=1e-5)
    assert max(sizes) <= 128
