"""The image encoder's order of patches and of its stages."""

import jax.numpy as jnp
import numpy as np

from paligemma_jax.models.paligemma import PaliGemma
from tests.tiny import SIGLIP, random_images


def test_patches_go_row_by_row(tiny_model: PaliGemma):
    p, grid = SIGLIP.patch_size, SIGLIP.image_size // SIGLIP.patch_size
    image = random_images(1)[0]
    embed = tiny_model.img.patch_embed
    kernel = np.asarray(embed.kernel[...])
    patches = [
        image[0, p * row : p * (row + 1), p * column : p * (column + 1)]
        for row in range(grid)
        for column in range(grid)
    ]
    wanted = np.einsum("Phwc,hwcD->PD", np.stack(patches), kernel) + np.asarray(embed.bias[...])
    np.testing.assert_allclose(embed(jnp.asarray(image))[0], wanted, atol=1e-5)


def test_position_embeddings_tell_patches_apart(tiny_model: PaliGemma):
    size = SIGLIP.image_size
    out = np.asarray(tiny_model.img.encode(jnp.zeros((1, size, size, 3))))[0]
    assert all(np.abs(out[0] - other).max() > 1e-2 for other in out[1:])


def test_head_projects_the_normalised_output(tiny_model: PaliGemma):
    image = jnp.asarray(random_images(2)[:, 0])
    img = tiny_model.img
    encoded = img.encode(image)
    assert encoded.shape == (2, SIGLIP.num_patches, SIGLIP.width)
    kernel, bias = img.head.kernel[...], img.head.bias[...]
    np.testing.assert_allclose(img(image), encoded @ kernel + bias[None, None], atol=1e-5)
