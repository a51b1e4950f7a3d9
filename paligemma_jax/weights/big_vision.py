"""big_vision's npz checkpoints: names, and the configuration read off the shapes.

Names and shapes: google-research/big_vision, models/proj/paligemma (commit 0127fb6). They are the
model's own but for SigLIP's names and two weights of the MLP.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from paligemma_jax.config import GEMMA2_27B, GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.weights.arrays import FLOATS
from paligemma_jax.weights.npz import NpzFile
from paligemma_jax.weights.published import with_text_length
from paligemma_jax.weights.source import Fill, TensorSpec, piece_places
from paligemma_jax.weights.strict import find_problems, misfit, require_fit
from paligemma_jax.weights.tree import Shape, expected_shapes

_PREFIXES = ("params/", "opt/target/", "")
_BLOCK = "img/Transformer/encoderblock"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_RENAMED = {
    "img/patch_embed": "img/embedding",
    "img/pos_embed": "img/pos_embedding",
    "img/blocks/norm1": f"{_BLOCK}/LayerNorm_0",
    "img/blocks/norm2": f"{_BLOCK}/LayerNorm_1",
    "img/blocks/attn/q": f"{_ATTENTION}/query",
    "img/blocks/attn/k": f"{_ATTENTION}/key",
    "img/blocks/attn/v": f"{_ATTENTION}/value",
    "img/blocks/attn/out": f"{_ATTENTION}/out",
    "img/blocks/mlp/fc1": f"{_BLOCK}/MlpBlock_0/Dense_0",
    "img/blocks/mlp/fc2": f"{_BLOCK}/MlpBlock_0/Dense_1",
    "img/norm": "img/Transformer/encoder_norm",
    "llm/layers/mlp/gating_einsum/w": "llm/layers/mlp/gating_einsum",
    "llm/layers/mlp/linear/w": "llm/layers/mlp/linear",
}


def big_vision_name(path: str) -> str:
    """big_vision's name, without "params/", of one of the model's paths."""
    for ours, theirs in _RENAMED.items():
        if path == ours or path.startswith(f"{ours}/"):
            return theirs + path.removeprefix(ours)
    return path


class BigVisionSource:
    """An npz file as big_vision publishes it, whole or in parts; see `Source`.

    The configuration follows from the shapes, except what shapes cannot tell: the 27B's query scale
    is recognised by its width, Gemma 2 by its second norms (attention soft-cap 50). A given
    `config` replaces the inferred one and must fit the shapes.
    """

    kind = "big_vision"

    def __init__(self, path: Path, parts: list[Path], config: PaliGemmaConfig | None = None):
        self.path = path
        self._file = NpzFile(path, parts)
        try:
            self._names, self.config = self._match(config)
        except CheckpointError:
            self.close()
            raise
        self.specs: dict[str, TensorSpec] = {}
        for ours, name in self._names.items():
            array = self._file.arrays[name]
            # 64-bit arrays come from numpy initialisers; JAX itself would read them as 32-bit.
            wide = array.dtype == np.float64
            dtype = FLOATS["float32"] if wide else array.dtype
            self.specs[ours] = TensorSpec(array.shape, dtype)

    def _match(self, config: PaliGemmaConfig | None) -> tuple[dict[str, str], PaliGemmaConfig]:
        arrays = self._file.arrays
        prefix = next(
            (p for p in _PREFIXES if any(n.startswith((f"{p}img/", f"{p}llm/")) for n in arrays)),
            None,
        )
        if prefix is None:
            some = ", ".join(list(arrays)[:3]) or "nothing"
            raise CheckpointError(
                f"{self.path} is no PaliGemma checkpoint: it holds {some}. An npz file with "
                "img/... and llm/... arrays, as big_vision writes it, fits. Get one from the "
                "published models."
            )
        found = {name.removeprefix(prefix): array.shape for name, array in arrays.items()}
        config = config or with_text_length(infer_config(found, self.path), self.path)
        expected = {big_vision_name(n): s for n, s in expected_shapes(config).items()}
        require_fit(self.path, found, expected)
        wrong = [
            f"dtype       {name}: {array.dtype}, model {', '.join(FLOATS)}"
            for name, array in arrays.items()
            if array.dtype not in FLOATS.values()
        ]
        if wrong:
            raise misfit(self.path, wrong)
        return {n: prefix + big_vision_name(n) for n in expected_shapes(config)}, config

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        count = len(piece_places(name, self.specs[name].shape))
        return self._file.parts(self._names[name], count)

    def close(self) -> None:
        self._file.close()


def infer_config(found: Mapping[str, Shape], path: Path) -> PaliGemmaConfig:
    """The configuration whose arrays `found` are; CheckpointError if there is none.

    `found` has big_vision's names without prefix. `text_length` is the default.
    """
    post_norms = any("post_attention_norm" in name or "post_ffw_norm" in name for name in found)
    ranks = {big_vision_name(n): s for n, s in expected_shapes(_example(post_norms)).items()}
    # Names and ranks first, so that the sizes below can be read without looking back.
    named = {name: found.get(name, shape) for name, shape in ranks.items()}
    problems = find_problems(dict.fromkeys(found), dict.fromkeys(ranks))
    problems += [
        f"shape       {name}: checkpoint {shape}, model {len(ranks[name])} dimensions"
        for name, shape in named.items()
        if len(shape) != len(ranks[name])
    ]
    if problems:
        raise misfit(path, problems)
    try:
        return _read_sizes({name: found[big_vision_name(name)] for name in _SIZED}, post_norms)
    except ConfigError as e:
        raise misfit(path, [str(e)]) from e


_SIZED = (
    "img/patch_embed/kernel",
    "img/pos_embed",
    "img/blocks/attn/q/kernel",
    "img/blocks/mlp/fc1/kernel",
    "llm/embedder/input_embedding",
    "llm/layers/attn/q_einsum/w",
    "llm/layers/attn/kv_einsum/w",
    "llm/layers/mlp/gating_einsum/w",
)


def _example(post_norms: bool) -> PaliGemmaConfig:
    """Some configuration of the family; only its names and ranks matter."""
    return PaliGemmaConfig(
        img=SigLIPConfig(image_size=1, patch_size=1, width=1, depth=1, mlp_dim=1, num_heads=1),
        llm=dataclasses.replace(GEMMA2_27B, post_norms=post_norms),
    )


def _read_sizes(shapes: Mapping[str, Shape], post_norms: bool) -> PaliGemmaConfig:
    patch_size = shapes["img/patch_embed/kernel"][0]
    patches = shapes["img/pos_embed"][1]
    grid = math.isqrt(patches)
    if grid**2 != patches:
        raise ConfigError(f"{patches} position embeddings are no square")
    img_depth, img_width, img_heads, _ = shapes["img/blocks/attn/q/kernel"]
    depth, heads, width, head_dim = shapes["llm/layers/attn/q_einsum/w"]
    is_27b = width == GEMMA2_27B.width and post_norms
    return PaliGemmaConfig(
        img=SigLIPConfig(
            image_size=grid * patch_size,
            patch_size=patch_size,
            width=img_width,
            depth=img_depth,
            mlp_dim=shapes["img/blocks/mlp/fc1/kernel"][-1],
            num_heads=img_heads,
        ),
        llm=GemmaConfig(
            width=width,
            depth=depth,
            mlp_dim=shapes["llm/layers/mlp/gating_einsum/w"][-1],
            num_heads=heads,
            num_kv_heads=shapes["llm/layers/attn/kv_einsum/w"][2],
            head_dim=head_dim,
            query_scale=((width / heads) if is_27b else head_dim) ** -0.5,
            vocab_size=shapes["llm/embedder/input_embedding"][0],
            post_norms=post_norms,
            attn_logit_softcap=50.0 if post_norms else 0.0,
        ),
    )
