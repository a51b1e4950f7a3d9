"""Training batches of the synthetic world: batch i is a pure function of the seed and i.

Letters: I pictures, R rows of one group, T text tokens.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.demo.mask_codes import MaskCodes
from paligemma_jax.demo.pages import sample_page
from paligemma_jax.demo.patches import patch_targets
from paligemma_jax.demo.render import draw_picture
from paligemma_jax.demo.scene import Shape, Text, sample_pair, sample_scene
from paligemma_jax.demo.splits import PAGES, PAIRS, split_rng
from paligemma_jax.demo.tasks import SAMPLERS, Example, same_answer, sample_examples, sample_segment
from paligemma_jax.processing.tokenizer import Tokenizer

Group = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What one batch holds; see configs/demo.py."""

    scenes: int
    short: int
    long: int
    pairs: int
    pages: int
    short_length: int
    long_length: int
    pair_length: int
    supersampled_share: float
    text_share: float
    short_weights: Mapping[str, float]
    long_weights: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """Side of a picture in pixels, and of its grid of patches."""

    size: int
    side: int


def encode(tokenizer: Tokenizer, examples: Sequence[Example], length: int) -> Group:
    """Arrays text, mask_ar, mask_loss i32[R, T] as big_vision lays them out, and the row's task.

    Raises:
      ValueError: if an example needs more than `length` tokens.
    """
    shape = (len(examples), length)
    text = np.full(shape, tokenizer.pad_id, np.int32)
    mask_ar, mask_loss = np.ones(shape, np.int32), np.zeros(shape, np.int32)
    newline = tokenizer.encode("\n")
    for row, example in enumerate(examples):
        prefix = [tokenizer.bos_id, *tokenizer.encode(example.prompt), *newline]
        suffix = [*tokenizer.encode(example.answer), tokenizer.eos_id]
        end = len(prefix) + len(suffix)
        if end > length:
            raise ValueError(
                f"{example.prompt!r} with its answer takes {end} tokens; the group holds {length}. "
                "Raise its length in the configuration."
            )
        text[row, :end] = prefix + suffix
        mask_ar[row, : len(prefix)] = 0
        mask_loss[row, len(prefix) : end] = 1
    return {
        "text": text,
        "mask_ar": mask_ar,
        "mask_loss": mask_loss,
        "task": np.array([example.task for example in examples]),
    }


def make_batch(
    tokenizer: Tokenizer,
    config: BatchConfig,
    picture: PictureConfig,
    seed: int,
    split: int,
    index: int,
    codes: MaskCodes,
) -> dict[str, Any]:
    """Pictures u8[I, size, size, 3] (scenes, then pairs, then pages) and three groups of rows.

    `patches` holds what each patch of each picture shows; each group's `image` i32[R, n] says
    which n pictures a row is about.
    """
    drawn: list[tuple[Sequence[Shape], Sequence[Text], int, bool]] = []
    short: list[Example] = []
    long: list[Example] = []
    pair: list[Example] = []
    samplers = {**SAMPLERS, "segment": functools.partial(sample_segment, codes=codes)}
    for i in range(config.scenes):
        rng = split_rng(seed, split, index * config.scenes + i)
        scene = sample_scene(rng)
        if rng.random() < config.text_share:
            while scene.text is None:
                scene = sample_scene(rng)
        larger = rng.random() < config.supersampled_share
        drawn.append((scene.shapes, scene.texts, scene.background, larger))
        short += sample_examples(scene, rng, config.short, config.short_weights)
        long += sample_examples(scene, rng, config.long, config.long_weights, samplers)
    for i in range(config.pairs):
        rng = split_rng(seed, split + PAIRS, index * config.pairs + i)
        first, second, same = sample_pair(rng)
        larger = rng.random() < config.supersampled_share
        drawn += [(s.shapes, s.texts, s.background, larger) for s in (first, second)]
        pair.append(same_answer(same))
    single = np.arange(config.scenes)[:, None]
    after = config.scenes + np.arange(2 * config.pairs).reshape(-1, 2)
    for i in range(config.pages):
        rng = split_rng(seed, split + PAGES, index * config.pages + i)
        larger = rng.random() < config.supersampled_share
        drawn.append(((), sample_page(rng), int(rng.integers(2**32)), larger))
    pictures = [_picture(*what, picture.size) for what in drawn]
    patches = [patch_targets(shapes, texts, picture.side) for shapes, texts, _, _ in drawn]
    return {
        "pictures": np.stack(pictures),
        "patches": {name: np.stack([p[name] for p in patches]) for name in patches[0]},
        "short": encode(tokenizer, short, config.short_length)
        | {"image": np.repeat(single, config.short, axis=0)},
        "long": encode(tokenizer, long, config.long_length)
        | {"image": np.repeat(single, config.long, axis=0)},
        "pair": encode(tokenizer, pair, config.pair_length) | {"image": after},
    }


def _picture(
    shapes: Sequence[Shape], texts: Sequence[Text], background: int, larger: bool, size: int
) -> np.ndarray:
    if not larger:
        return draw_picture(shapes, texts, background, size)
    large = Image.fromarray(draw_picture(shapes, texts, background, 2 * size))
    return np.asarray(large.resize((size, size), Image.Resampling.BILINEAR))
