"""Hugging Face's names and layouts of PaliGemma's tensors, as one table read in both directions.

Facts: transformers' PaliGemma conversion scripts. A PyTorch Linear weight is (out, in); heads are
merged into one axis; every layer has tensors of its own.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.tree import Shape, expected_shapes

EMBEDDING = "language_model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

Axes = tuple[tuple[int, ...], ...]
_SAME: Axes = ((0,),)
_PLAIN: Axes = ((0,), (1,))
_TRANSPOSED: Axes = ((1,), (0,))


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One Hugging Face tensor as a part of one of ours.

    Attributes:
      key: canonical name (see `canonical_key`), `{}` standing for the layer.
      path: ours.
      axes: for each of its axes, the axes of ours (layer and part removed) that it merges.
      part: index on our leading axis where ours joins two of theirs (k and v, gate and up).
    """

    key: str
    path: str
    axes: Axes
    part: int | None = None

    @property
    def layered(self) -> bool:
        return "{}" in self.key

    def shape(self, ours: Shape) -> Shape:
        """Its shape in their layout, given the shape of ours without layer and part."""
        return tuple(math.prod(ours[axis] for axis in group) for group in self.axes)

    def to_ours(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        """View of their array in our axis order, `ours` being that shape."""
        order = [axis for group in self.axes for axis in group]
        return theirs.reshape([ours[axis] for axis in order]).transpose(np.argsort(order))

    def as_theirs(self, ours: np.ndarray) -> np.ndarray | None:
        """The memory of an array of ours in their layout, if it lies in that order; else None."""
        order = [axis for group in self.axes for axis in group]
        ordered = ours.transpose(order)
        return ordered.reshape(self.shape(ours.shape)) if ordered.flags.c_contiguous else None

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """C-order array in their layout."""
        order = [axis for group in self.axes for axis in group]
        return np.ascontiguousarray(ours.transpose(order).reshape(self.shape(ours.shape)))


def canonical_key(key: str) -> str:
    """One name for a tensor whichever of the four layouts in the wild it comes from.

    They differ in a leading `model.`, in where the decoder is, and in `vision_model.`.
    """
    key = key.removeprefix("model.")
    key = re.sub(r"^language_model\.lm_head\.", "lm_head.", key)
    key = re.sub(r"^language_model\.model\.", "language_model.", key)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", key)


def published_key(key: str) -> str:
    """The name in the published repositories, which all versions read, of a canonical one."""
    key = re.sub(r"^language_model\.", "language_model.model.", key)
    key = re.sub(r"^lm_head\.", "language_model.lm_head.", key)
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", key)


def is_buffer(key: str) -> bool:
    """Whether a tensor is a constant that old versions saved along, e.g. position ids."""
    return key.endswith((".position_ids", ".rotary_emb.inv_freq"))


def hf_tensors(config: PaliGemmaConfig) -> list[HFTensor]:
    """The tensors that a checkpoint of `config` has, the embedding's filler rows apart."""
    return [*_vision_tensors(), *_text_tensors(config)]


def _vision_tensors() -> Iterator[HFTensor]:
    embeddings, layer = "vision_tower.embeddings", "vision_tower.encoder.layers.{}"
    patch = "img/patch_embed"
    yield HFTensor(
        f"{embeddings}.patch_embedding.weight", f"{patch}/kernel", ((3,), (2,), (0,), (1,))
    )
    yield HFTensor(f"{embeddings}.patch_embedding.bias", f"{patch}/bias", _SAME)
    yield HFTensor(f"{embeddings}.position_embedding.weight", "img/pos_embed", ((0, 1), (2,)))
    for n in (1, 2):
        yield from _norm(f"{layer}.layer_norm{n}", f"img/blocks/norm{n}")
    for projection in ("q", "k", "v"):
        theirs, ours = f"{layer}.self_attn.{projection}_proj", f"img/blocks/attn/{projection}"
        yield HFTensor(f"{theirs}.weight", f"{ours}/kernel", ((1, 2), (0,)))
        yield HFTensor(f"{theirs}.bias", f"{ours}/bias", ((0, 1),))
    out = f"{layer}.self_attn.out_proj"
    yield HFTensor(f"{out}.weight", "img/blocks/attn/out/kernel", ((2,), (0, 1)))
    yield HFTensor(f"{out}.bias", "img/blocks/attn/out/bias", _SAME)
    for fc in ("fc1", "fc2"):
        yield HFTensor(f"{layer}.mlp.{fc}.weight", f"img/blocks/mlp/{fc}/kernel", _TRANSPOSED)
        yield HFTensor(f"{layer}.mlp.{fc}.bias", f"img/blocks/mlp/{fc}/bias", _SAME)
    yield from _norm("vision_tower.post_layernorm", "img/norm")
    projector = "multi_modal_projector.linear"
    yield HFTensor(f"{projector}.weight", "img/head/kernel", _TRANSPOSED)
    yield HFTensor(f"{projector}.bias", "img/head/bias", _SAME)


def _text_tensors(config: PaliGemmaConfig) -> Iterator[HFTensor]:
    layer, ours = "language_model.layers.{}", "llm/layers"
    yield HFTensor(EMBEDDING, "llm/embedder/input_embedding", _PLAIN)
    attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    per_head: Axes = ((0, 2), (1,))
    yield HFTensor(f"{attn}.q_proj.weight", f"{ours}/attn/q_einsum/w", per_head)
    for part, projection in enumerate(("k", "v")):
        yield HFTensor(
            f"{attn}.{projection}_proj.weight", f"{ours}/attn/kv_einsum/w", per_head, part
        )
    yield HFTensor(f"{attn}.o_proj.weight", f"{ours}/attn/attn_vec_einsum/w", ((2,), (0, 1)))
    for part, name in enumerate(("gate", "up")):
        yield HFTensor(
            f"{mlp}.{name}_proj.weight", f"{ours}/mlp/gating_einsum/w", _TRANSPOSED, part
        )
    yield HFTensor(f"{mlp}.down_proj.weight", f"{ours}/mlp/linear/w", _TRANSPOSED)
    # One name, two roles: Gemma's post_attention_layernorm is the norm before the MLP.
    norms = {"input_layernorm": "pre_attention_norm"}
    if config.llm.post_norms:
        norms["post_attention_layernorm"] = "post_attention_norm"
        norms["pre_feedforward_layernorm"] = "pre_ffw_norm"
        norms["post_feedforward_layernorm"] = "post_ffw_norm"
    else:
        norms["post_attention_layernorm"] = "pre_ffw_norm"
    for theirs, name in norms.items():
        yield HFTensor(f"{layer}.{theirs}.weight", f"{ours}/{name}/scale", _SAME)
    yield HFTensor("language_model.norm.weight", "llm/final_norm/scale", _SAME)
    if not config.llm.tie_embeddings:
        yield HFTensor(LM_HEAD, "llm/lm_head/w", _PLAIN)


def _norm(theirs: str, ours: str) -> Iterator[HFTensor]:
    yield HFTensor(f"{theirs}.weight", f"{ours}/scale", _SAME)
    yield HFTensor(f"{theirs}.bias", f"{ours}/bias", _SAME)


def part_shape(tensor: HFTensor, ours: Shape) -> Shape:
    """Shape of the part of ours that `tensor` is: without layer axis and without joined axis."""
    return ours[int(tensor.layered) + int(tensor.part is not None) :]


def hf_shapes(config: PaliGemmaConfig) -> dict[str, Shape]:
    """Canonical name and shape of every tensor of a checkpoint of `config`, filler rows apart."""
    ours = expected_shapes(config)
    shapes = {}
    for tensor in hf_tensors(config):
        shape = tensor.shape(part_shape(tensor, ours[tensor.path]))
        for layer in range(ours[tensor.path][0] if tensor.layered else 1):
            shapes[tensor.key.format(layer)] = shape
    return shapes
