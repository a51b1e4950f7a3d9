"""What the files of a checkpoint do not say, taken from the table of published ones."""

import dataclasses
from pathlib import Path

from paligemma_jax.config import VARIANTS, PaliGemmaConfig


def with_text_length(config: PaliGemmaConfig, path: Path) -> PaliGemmaConfig:
    """`config` with the text length its published checkpoint was trained with.

    Fine-tunes share an architecture, so a published name in `path` decides; without one it is the
    pretrained checkpoint's. An unpublished architecture keeps the length it has.
    """
    same = [name for name, variant in VARIANTS.items() if _alike(variant, config)]
    named = [name for name in same if name in str(path.absolute())]
    if not same:
        return config
    # "pt" stands before all others in the table; the longest of several names is the whole one.
    name = max(named, key=len) if named else same[0]
    return dataclasses.replace(config, text_length=VARIANTS[name].text_length)


def _alike(a: PaliGemmaConfig, b: PaliGemmaConfig) -> bool:
    sizes = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    return a.img == b.img and all(getattr(a.llm, n) == getattr(b.llm, n) for n in sizes)
