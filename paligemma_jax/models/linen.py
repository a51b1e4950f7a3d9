"""The model as a Flax Linen module, for programs that are written in Linen.

flax.nnx.bridge could wrap the module, too, but makes random weights anew at every `apply`, and
keeps them in silence where the given parameters lack one or have another shape.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jaxtyping import Array, Float, Int

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.gemma import Gemma
from paligemma_jax.models.layers import DType
from paligemma_jax.models.paligemma import GraphDef, PaliGemma, abstract_model, to_params
from paligemma_jax.models.siglip import SigLIP


def to_linen(
    config: PaliGemmaConfig,
    *,
    dtype: DType = jnp.float32,
    param_dtype: DType = jnp.float32,
    name: str | None = None,
) -> "LinenPaliGemma":
    """A Linen module of this architecture, alone or as a part of another one (called `name` there).

    Its parameters are those of `PaliGemma`, by names and shapes:

        model = pg.load_model("paligemma2-3b-pt-224")
        module, (_, params) = pg.to_linen(model.config, dtype=model.dtype), model.split()
        logits = jax.jit(module.apply)({"params": params}, images, tokens, mask_ar)

    `dtype` is the activations', and `param_dtype` that of the random weights of `init`.
    """
    return LinenPaliGemma(config, jnp.dtype(dtype), jnp.dtype(param_dtype), name=name)


class LinenPaliGemma(linen.Module):
    """See `to_linen`; `apply` raises for parameters of other names or shapes."""

    config: PaliGemmaConfig
    dtype: DType
    param_dtype: DType

    def setup(self) -> None:
        kw: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        config = self.config

        def make_encoder(key: jax.Array) -> dict[str, Any]:
            return to_params(SigLIP(config.img, config.llm.width, rngs=nnx.Rngs(key), **kw))

        def make_decoder(key: jax.Array) -> dict[str, Any]:
            return to_params(Gemma(config.llm, rngs=nnx.Rngs(key), **kw))

        given = self.variables.get("params")
        if given:  # names: below, Linen compares shapes in their order
            self._graphdef().check(given)
        self.img = self.param("img", make_encoder)
        self.llm = self.param("llm", make_decoder)

    def __call__(
        self,
        images: Float[Array, "B *N height width 3"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """As `PaliGemma`."""
        return self._model()(images, tokens, mask_ar)

    def encode_images(self, images: Float[Array, "B *N height width 3"]) -> Float[Array, "B NP W"]:
        """As `PaliGemma`: module.apply(variables, images, method="encode_images")."""
        return self._model().encode_images(images)

    def _model(self) -> PaliGemma:
        return self._graphdef().merge({"img": self.img, "llm": self.llm})

    def _graphdef(self) -> GraphDef:
        return _make_graphdef(self.config, self.dtype)


@functools.lru_cache(maxsize=16)
def _make_graphdef(config: PaliGemmaConfig, dtype: DType) -> GraphDef:
    return abstract_model(config, dtype).split()[0]
