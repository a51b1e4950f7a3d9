"""PaliGemma (arXiv 2407.07726): SigLIP image tokens and text tokens through one Gemma decoder.

Also its functional form (`GraphDef`), and models made from weights without random ones.

Letters: B batch, N images a sequence, P patches an image, T text tokens, S cache slots, W decoder
width, V vocabulary, M attention masks (1, or 2 with a sliding window: even layers, odd layers).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.gemma import Gemma, State
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.layers import Dropout, DType, Remat
from paligemma_jax.models.masks import Layer, PrefixMask, SlotMask
from paligemma_jax.models.siglip import SigLIP


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": leaf} -> {"a": {"b": leaf}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Inverse of `nest`; keys that are numbers become strings."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclasses.dataclass(frozen=True)
class GraphDef:
    """A model, of whatever form, without its arrays; hashable.

    `paths` are those of the model's tree, in its order: "llm/layers/attn/q_einsum/w".
    """

    graphdef: Any
    treedef: Any
    paths: tuple[str, ...]

    def apply(self, params: Mapping[str, Any], *args: Any) -> Any:
        """Logits of images, tokens and mask_ar by the model with these parameters.

        Raises as `merge`.
        """
        return self.merge(params)(*args)

    def merge(self, params: Mapping[str, Any]) -> Any:
        """The model around parameters as `split` gives them, nested; nothing is copied or cast.

        Raises as `check`.
        """
        self.check(params)
        return self.merge_flat(flatten(params))

    def check(self, params: Mapping[str, Any]) -> None:
        """Raises ConfigError that names all parameters that are missing or unexpected.

        Shapes are not checked.
        """
        found, known = flatten(params), set(self.paths)
        problems = [f"missing     {path}" for path in self.paths if path not in found]
        problems += [f"unexpected  {path}" for path in found if path not in known]
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            listing = "\n  ".join(problems)
            raise ConfigError(
                f"The parameters do not match the model ({count}):\n  {listing}\nTake them from "
                "a model of the same configuration and form: graphdef, params = model.split()"
            )

    def merge_flat(self, arrays: Mapping[str, Any]) -> Any:
        """The model around arrays by flat path; nothing is copied."""
        state = jax.tree.unflatten(self.treedef, [arrays[path] for path in self.paths])
        return nnx.merge(self.graphdef, state)


def split_model(model: nnx.Module) -> tuple[GraphDef, dict[str, Any]]:
    """The graphdef and the arrays (or shapes) by flat path; nothing is copied."""
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    arrays = {"/".join(_name(key) for key in path[:-1]): leaf for path, leaf in leaves}
    return GraphDef(graphdef, treedef, tuple(arrays)), arrays


def _name(key: Any) -> str:
    """A part of a path; the last key of each, the variable's own, is left out above."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


class PaliGemma(nnx.Module):
    """Image encoder `img` and decoder `llm`; parameters under the same two names as in big_vision.

    Args:
      config: the architecture.
      rngs: source of the random initial weights.
      dtype: dtype of activations and of the key-value cache; norms, softmax, rotary angles and
        logits are float32 whatever it is.
      param_dtype: dtype of the weights.
    """

    def __init__(
        self,
        config: PaliGemmaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        self.config = config
        self.dtype = dtype
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.img = SigLIP(config.img, config.llm.width, **kw)
        self.llm = Gemma(config.llm, **kw)

    def split(self) -> tuple[GraphDef, dict[str, Any]]:
        """The functional form: the model without its arrays, and these in a plain nested dict.

            graphdef, params = model.split()
            logits = jax.jit(graphdef.apply)(params, images, tokens, mask_ar)
            image_tokens = graphdef.merge(params).encode_images(images)

        Nothing is copied. Parameters of a stacked model (`load_model`) have the names and shapes of
        a checkpoint: params["llm"]["layers"]["attn"]["q_einsum"]["w"]. Where layers stand one by
        one (`from_pretrained`), each has its number: params["llm"]["layers"]["0"]["attn"].
        """
        graphdef, arrays = split_model(self)
        return graphdef, nest(arrays)

    def encode_images(
        self, images: Float[Array, "B *N height width 3"], remat: Remat = "none"
    ) -> Float[Array, "B NP W"]:
        """Image tokens; several images an example ([B, N, height, width, 3]) are concatenated."""
        batch = images.shape[0]
        flat = images.reshape(-1, *images.shape[-3:])
        if flat.shape[0] == 0:  # a prompt without images
            return jnp.zeros((batch, 0, self.config.llm.width), self.dtype)
        tokens = self.img(flat, remat)
        return tokens.reshape(batch, -1, tokens.shape[-1])

    def __call__(
        self,
        images: Float[Array, "B *N height width 3"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """Logits f32 at every text position, teacher forced.

        Padding needs no mask: it comes last and `mask_ar` 1 hides it from what stands before.
        """
        return self.forward(self.encode_images(images), tokens, mask_ar)

    def forward(
        self,
        image_tokens: Float[Array, "B NP W"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """As `__call__`, from image tokens that are encoded already."""
        return self.llm.logits(self.hidden(image_tokens, tokens, mask_ar))

    def hidden(
        self,
        image_tokens: Float[Array, "B NP W"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
        dropout: Dropout | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B T W"]:
        """Final hidden states of the text positions, before the output head."""
        mask_input = jnp.ones(tokens.shape, bool)
        x, mask = self._sequence(image_tokens, tokens, mask_ar, mask_input)
        hidden = self.llm(x, mask.query_positions, mask, dropout, remat)
        return hidden[:, image_tokens.shape[1] :]

    def hidden_with_attention(
        self,
        image_tokens: Float[Array, "B NP W"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
        mask_input: Bool[Array, "B T"],
        update: Callable[[State, jax.Array, Layer], State],
        state: State,
    ) -> tuple[Float[Array, "B T W"], State]:
        """As `hidden`, and what `update` made of every layer's attention weights.

        See `Gemma.with_attention`. Queries and keys are image tokens, then text; no query attends
        to padding (`mask_input` False).
        """
        x, mask = self._sequence(image_tokens, tokens, mask_ar, mask_input)
        hidden, state = self.llm.with_attention(x, mask.query_positions, mask, update, state)
        return hidden[:, image_tokens.shape[1] :], state

    def attention_masks(
        self, mask_ar: Int[Array, "B S"], input_mask: Bool[Array, "B S"]
    ) -> Bool[Array, "M B S S"]:
        """Masks over a whole sequence of image and text tokens, one for each kind of layer."""
        mask = PrefixMask.of(mask_ar, input_mask, self.config.llm.sliding_window)
        kinds = 1 if mask.window is None else 2
        return jnp.stack([mask.visible(layer) for layer in range(kinds)])

    def prefill(
        self,
        image_tokens: Float[Array, "B NP W"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
        mask_input: Bool[Array, "B T"],
        slots: int,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits after each last prompt token, and a cache of `slots` slots to go on with.

        Prompts may differ in length: padding on the right, `mask_input` False there.
        """
        x, mask = self._sequence(image_tokens, tokens, mask_ar, mask_input)
        cache = self.llm.empty_cache(x.shape[0], slots)
        cache = cache.reserve(mask.query_valid, mask.query_positions)
        hidden, cache = self.llm.prefill(x, mask.query_positions, mask, cache)
        last = image_tokens.shape[1] + jnp.sum(mask_input, axis=1) - 1
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return self.llm.logits(hidden)[:, 0], cache.advance(x.shape[1])

    def extend(
        self, tokens: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits after one more token of each sequence."""
        positions = jnp.max(jnp.where(cache.valid, cache.positions, -1), axis=1)[:, None] + 1
        cache = cache.reserve(jnp.ones((tokens.shape[0], 1), bool), positions)
        visible = cache.valid[:, None, :]
        logits, cache = self._extend(tokens[:, None], positions, visible, cache)
        return logits[:, 0], cache

    def extend_many(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        visible: Bool[Array, "B T S"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T V"], KVCache]:
        """Logits after each of T more tokens, which need not follow one another.

        They take the next T slots; `visible` says which slots each attends to, its own among them,
        and `positions` where in the sequence it stands.
        """
        cache = cache.reserve(jnp.ones(tokens.shape, bool), positions)
        return self._extend(tokens, positions, visible, cache)

    def packed_continuations(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"], cache: KVCache
    ) -> Float[Array, "B T W"]:
        """Final hidden states of several continuations of each prompt, packed into one sequence.

        Tokens with equal `segment_ids` stand together and make one continuation: each attends to
        the whole cache, and of its own continuation to itself and what stands before. The cache
        stays as it is, ready for more of them.
        """
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        own = same & jnp.tril(jnp.ones(same.shape[1:], bool))
        last = jnp.max(jnp.where(cache.valid, cache.positions, -1), axis=1)
        positions = last[:, None] + jnp.sum(own, axis=2)
        prompt = jnp.broadcast_to(cache.valid[:, None, :], (*tokens.shape, cache.valid.shape[1]))
        keys = jnp.concatenate([cache.positions, positions], axis=1)
        mask = self._slot_mask(jnp.concatenate([prompt, own], axis=2), positions, keys)
        return self.llm.continuations(self.llm.embedder.encode(tokens), positions, mask, cache)

    def _extend(
        self, tokens: jax.Array, positions: jax.Array, visible: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Logits of tokens whose slots are reserved already."""
        mask = self._slot_mask(visible, positions, cache.positions)
        x = self.llm.embedder.encode(tokens)
        hidden, cache = self.llm.extend(x, positions, mask, cache)
        return self.llm.logits(hidden), cache.advance(tokens.shape[1])

    def _slot_mask(
        self, allowed: jax.Array, query_positions: jax.Array, key_positions: jax.Array
    ) -> SlotMask:
        return SlotMask(allowed, query_positions, key_positions, self.config.llm.sliding_window)

    def _sequence(
        self, image_tokens: jax.Array, tokens: jax.Array, mask_ar: jax.Array, mask_input: jax.Array
    ) -> tuple[jax.Array, PrefixMask]:
        """Embeddings of images followed by text, and their mask."""
        x = jnp.concatenate(
            [image_tokens.astype(self.dtype), self.llm.embedder.encode(tokens)], axis=1
        )
        before = ((0, 0), (image_tokens.shape[1], 0))
        valid = jnp.pad(mask_input.astype(bool), before, constant_values=True)
        window = self.config.llm.sliding_window
        return x, PrefixMask.of(jnp.pad(mask_ar, before), valid, window)


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
    """The module around `params`, which must match `config`; nothing is copied or cast.

    `dtype` is the activations' dtype. Shapes are checked by the checkpoint loader, not here.
    """
    graphdef, state = nnx.split(abstract_model(config, dtype))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def parameter_count(config: PaliGemmaConfig) -> int:
    """Exact number of weights."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
