"""The mask codec's network: equal to big_vision's on the published names and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.models.mask_vae import Doubling, MaskVAE, MaskVAEConfig
from paligemma_jax.weights.mask_vae import load_mask_vae
from tests.goldens import GOLDEN

FOLDER = GOLDEN / "big_vision"


@pytest.fixture(scope="module")
def golden():
    return np.load(FOLDER / "mask_vae.golden.npz")


@pytest.fixture(scope="module")
def model() -> MaskVAE:
    return load_mask_vae(FOLDER / "mask_vae.params.npz")


def test_codes_of_masks_are_big_visions(golden, model: MaskVAE):
    np.testing.assert_array_equal(model.encode(jnp.asarray(golden["masks"])), golden["mask_codes"])


@pytest.mark.parametrize(
    ("codes", "masks"), [("codes", "decoded"), ("mask_codes", "decoded_of_mask_codes")]
)
def test_masks_of_codes_are_big_visions(golden, model: MaskVAE, codes: str, masks: str):
    decoded = model.decode(jnp.asarray(golden[codes]))
    np.testing.assert_allclose(decoded, golden[masks], atol=1e-4, rtol=1e-5)


def test_doubling_is_a_transposed_convolution():
    layer = Doubling(3, 5, rngs=nnx.Rngs(0))
    layer.bias.set_value(jnp.arange(5.0))
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    kernel = layer.kernel[...].transpose(0, 1, 3, 2)  # [h, w, out, in], as the gradient of a conv
    expected = jax.lax.conv_transpose(
        x, kernel, (2, 2), [(2, 2), (2, 2)], transpose_kernel=True,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
    )  # fmt: skip
    np.testing.assert_allclose(layer(x), expected + jnp.arange(5.0), atol=1e-5)


def test_published_sizes():
    model = nnx.eval_shape(lambda: MaskVAE(MaskVAEConfig(), rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.decoder)))
    assert count == 1_123_457  # of the published decoder
