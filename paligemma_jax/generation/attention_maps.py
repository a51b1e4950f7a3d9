"""How much attention each token of an answer paid to each image patch.

Letters: B batch, T text tokens, A answer tokens, N images an example, P patches an image, K = N P.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.errors import InvalidImageError, InvalidPromptError
from paligemma_jax.generation.generate import real_sequences
from paligemma_jax.models.attention_maps import AttentionSummary, MeanAttention, Region
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.masks import Layer
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import MIN_TEXT_LENGTH, Batch, bucket

MIN_ANSWER_LENGTH = 16


def image_attention_maps(
    model: PaliGemma,
    batch: Batch,
    answers: Sequence[Sequence[int]],
    *,
    summary: AttentionSummary = MeanAttention(),  # noqa: B008 (frozen)
) -> list[np.ndarray]:
    """One f32[A, N, g, g] for each real prompt: attention of each answer token to image patches.

    One pass over images, prompts and answers gives all of it. A token's weights are those of the
    position that it was predicted from, the token before it (for the first, the prompt's newline).
    The sum over N, g, g is the fraction of attention that went to the images; text got the rest.
    They do not explain an answer: see `models.attention_maps`.

    Memory beyond the ordinary pass is what is kept: for PaliGemma 3B at 448 pixels and 20 tokens
    82 kB (A x 1,024 x 4 bytes) a prompt, with `EveryHead` 12 MB (x 18 layers x 8 heads), with a
    rollout 4.7 MB (S x S x 4 bytes); room for tokens is rounded up to 32.

    Args:
      batch: the prompts, as `Processor` makes them.
      answers: for each real prompt the answer's tokens, such as `Generation.tokens`.
      summary: what becomes of layers and heads: `MeanAttention(layers=None, heads=None)`,
        `AttentionRollout()`, or `EveryHead()`, which gives f32[L, heads, A, N, g, g] a prompt.

    Raises:
      InvalidImageError: if the batch has no images.
      InvalidPromptError: for answers to another number of prompts, or tokens that the model lacks.
      ConfigError: for layers or heads that the model lacks.
    """
    images = None if batch.images is None else np.asarray(batch.images)
    if images is None or images.shape[1] == 0:
        raise InvalidImageError("expected a batch with images. Call processor([image], [prompt])")
    mask = real_sequences(batch)
    real = np.flatnonzero(mask)
    _check(answers, real.size, model.config.llm.vocab_size)
    placed: list[Sequence[int]] = [()] * mask.size
    for sequence, answer in zip(real, answers, strict=True):
        placed[sequence] = answer
    text, queries = _with_answers(batch, placed)
    keys = images.shape[1] * model.config.img.num_patches
    arrays = [jnp.asarray(x) for x in (images, *text, keys + queries)]
    weights = np.asarray(_attention(model, *arrays, summary=summary))
    side = model.config.img.image_size // model.config.img.patch_size
    shape = (images.shape[1], side, side)
    cut = [weights[i][..., : len(placed[i]), :] for i in real]
    return [own.reshape(*own.shape[:-1], *shape) for own in cut]


@functools.partial(Jitted, static_argnames=("summary",))
def _attention(
    model: PaliGemma,
    images: Float[Array, "B N height width 3"],
    tokens: Int[Array, "B T"],
    mask_ar: Int[Array, "B T"],
    mask_input: Bool[Array, "B T"],
    queries: Int[Array, "B A"],
    summary: AttentionSummary,
) -> Float[Array, "B ... A K"]:
    encoded = model.encode_images(images)
    region = Region(queries, encoded.shape[1], encoded.shape[1] + tokens.shape[1])

    def update(state: Any, weights: jax.Array, layer: Layer) -> Any:
        return summary.update(region, state, weights, layer)

    state = summary.init(model.config.llm, region)
    _, state = model.hidden_with_attention(encoded, tokens, mask_ar, mask_input, update, state)
    return summary.result(region, state)


def _with_answers(
    batch: Batch, answers: Sequence[Sequence[int]]
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Tokens, mask_ar and mask_input with each answer behind its prompt; and queries i32[B, A].

    Queries are text positions, those that predict the answer's tokens.
    Shapes are rounded up, so that a stream of different answers compiles few programs.
    """
    mask_input = np.asarray(batch.mask_input, bool)
    lengths = mask_input.sum(axis=1)
    ends = lengths + [len(answer) for answer in answers]
    width = bucket(int(max(mask_input.shape[1], ends.max())), MIN_TEXT_LENGTH)
    most = bucket(max(map(len, answers)), MIN_ANSWER_LENGTH)
    more = ((0, 0), (0, width - mask_input.shape[1]))
    tokens = np.pad(np.asarray(batch.tokens), more)
    mask_ar = np.pad(np.asarray(batch.mask_ar), more, constant_values=1)
    place = np.arange(width)[None]
    for row, answer in enumerate(answers):
        tokens[row, lengths[row] : ends[row]] = answer
        mask_ar[row, lengths[row] :] = 1
    queries = np.minimum(lengths[:, None] - 1 + np.arange(most), ends[:, None] - 1)
    return (tokens, mask_ar, place < ends[:, None]), queries.astype(np.int32)


def _check(answers: Sequence[Sequence[int]], count: int, vocab_size: int) -> None:
    if len(answers) != count:
        raise InvalidPromptError(
            f"answers: expected the tokens of one for each of {count} prompts, got {len(answers)}."
        )
    for number, answer in enumerate(answers):
        for token in answer:
            if not 0 <= token < vocab_size:
                raise InvalidPromptError(
                    f"answers[{number}]: expected tokens from 0 to {vocab_size - 1}, got {token}."
                )
