"""The steps of the full-size proof that run in processes of their own; see prove.py."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

BATCH, PREFIX, SUFFIX = 2, 8, 4


def inputs(size: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Images f32[B, H, W, 3] in [-1, 1] and tokens i32[B, T], the same in every process."""
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (BATCH, size, size, 3)).astype(np.float32)
    tokens = rng.integers(4, vocabulary, (BATCH, PREFIX + SUFFIX)).astype(np.int32)
    tokens[:, 0] = 2
    return images, tokens


def load(source: str) -> None:
    """Loads a checkpoint in bfloat16 and nothing else."""
    import jax

    from paligemma_jax.loading import from_pretrained

    jax.block_until_ready(jax.tree.leaves(from_pretrained(source, dtype="bfloat16").model))


def ours(source: str, target: str) -> None:
    """Teacher-forced logits in float32 by this library."""
    from paligemma_jax.loading import load_model

    model = load_model(source, dtype="float32")
    images, tokens = inputs(model.config.img.image_size, model.config.llm.vocab_size)
    mask_ar = np.zeros_like(tokens)
    mask_ar[:, PREFIX:] = 1
    import jax

    forward = jax.jit(lambda model, *batch: model(*batch))
    np.save(target, np.asarray(forward(model, images, tokens, mask_ar)))


def theirs(source: str, target: str) -> None:
    """The same by transformers, eager, over the vocabulary without its padding."""
    import torch
    import transformers

    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    vision: Any = model.config.vision_config
    image_token = model.config.image_token_index
    images, tokens = inputs(vision.image_size, image_token)
    patches = (vision.image_size // vision.patch_size) ** 2
    ids = np.concatenate([np.full((BATCH, patches), image_token), tokens], axis=1)
    types = np.zeros_like(ids)
    types[:, -SUFFIX:] = 1
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(ids),
            pixel_values=torch.tensor(np.moveaxis(images, -1, 1)),
            token_type_ids=torch.tensor(types),
            attention_mask=torch.ones(ids.shape, dtype=torch.long),
            logits_to_keep=tokens.shape[1],
        ).logits
    np.save(target, logits[..., :image_token].numpy())


def compare(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Largest difference of logits, their scale, and top-1 agreement."""
    return {
        "max_difference": float(np.abs(a - b).max()),
        "scale": float(np.abs(b).max()),
        "top1_agreement": float(np.mean(a.argmax(-1) == b.argmax(-1))),
    }


if __name__ == "__main__":
    {"load": load, "ours": ours, "theirs": theirs}[sys.argv[1]](*map(str, map(Path, sys.argv[2:])))
