"""Models of random weights that are made on the device, for those too large to be written."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from paligemma_jax.benchmark.implementation import Precision
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization import abstract_quantized
from paligemma_jax.models.unrolled import abstract_unrolled

SPREAD = 0.02  # of an initialisation


def random_model(config: PaliGemmaConfig, dtype: Precision, seed: int = 0) -> PaliGemma:
    """A model in the layout for inference; every float in it is random and differs from zero.

    One array is made at a time, in its own dtype, so that the weights are all that must fit.
    """
    name = jnp.dtype(dtype.floats.value)
    model = abstract_unrolled(config, name, name)
    if dtype.quantized:
        model = abstract_quantized(model, dtype)
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    filled = []
    for key, leaf in zip(keys, leaves, strict=True):
        filled.append(jax.block_until_ready(_fill(key, leaf.shape, leaf.dtype)))
    return nnx.merge(graphdef, jax.tree.unflatten(structure, filled))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _fill(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.bits(key, shape, jnp.uint8).view(jnp.int8).astype(dtype)
    width = SPREAD * 3**0.5
    values = jax.random.uniform(key, shape, dtype, -width, width)
    return jnp.where(values == 0, jnp.asarray(SPREAD, dtype), values)
