"""A model from its weights and back, without ever making random ones.

`params` is a plain nested dict of arrays, e.g. params["llm"]["layers"]["attn"]["q_einsum"]["w"].
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.layers import DType
from paligemma_jax.models.paligemma import PaliGemma

Params = dict[str, Any]


def abstract_model(
    config: PaliGemmaConfig, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
) -> PaliGemma:
    """The module with shapes and dtypes in place of arrays."""
    return nnx.eval_shape(
        lambda: PaliGemma(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)
    )


def abstract_params(config: PaliGemmaConfig, param_dtype: DType = jnp.float32) -> Params:
    """Nested dict of `jax.ShapeDtypeStruct`, one for each parameter."""
    return to_params(abstract_model(config, param_dtype=param_dtype))


def to_params(model: nnx.Module) -> Params:
    """The module's parameters as a plain nested dict; nothing is copied."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def from_params(config: PaliGemmaConfig, params: Params, dtype: DType) -> PaliGemma:
    """The module around `params`, which must fit `config`; nothing is copied or cast.

    `dtype` is the activations' dtype. Shapes are checked by the checkpoint loader, not here.
    """
    graphdef, state = nnx.split(abstract_model(config, dtype))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def parameter_count(config: PaliGemmaConfig) -> int:
    """Exact number of weights."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
