"""Which patches of its pictures a model looked at for each token of an answer.

Letters: B rows, T text tokens, A answer tokens, N images an example, P patches an image, K = N P.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.errors import InvalidImageError, InvalidPromptError
from paligemma_jax.models.attention_maps import AttentionSummary, MeanAttention, Region
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.masks import Layer
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import MIN_TEXT_LENGTH, Batch, bucket

MIN_ANSWER_LENGTH = 16


def attention_to_image(
    model: PaliGemma,
    batch: Batch,
    answers: Sequence[Sequence[int]],
    *,
    summary: AttentionSummary = MeanAttention(),  # noqa: B008 (frozen)
) -> list[np.ndarray]:
    """One f32[A, N, g, g] a real row: where the model looked when it chose each answer token.

    One pass over images, prompts and answers gives all of it. A token's weights are those of the
    place that it was predicted from, the token before it (for the first, the prompt's newline). The
    sum over N, g, g is the share of attention that went to the pictures; text got the rest.
    They do not explain an answer: see `models.attention_summary`.

    Memory beyond the ordinary pass is what is kept: for PaliGemma 3B at 448 pixels and 20 tokens
    82 kB (A x 1,024 x 4 bytes) a row, with `EveryHead` 12 MB (x 18 layers x 8 heads), with a
    rollout 4.7 MB (S x S x 4 bytes); room for tokens is rounded up to 32.

    Args:
      batch: the prompts, as `Processor` makes them.
      answers: for each real row the answer's tokens, such as `Generation.tokens`.
      summary: what becomes of layers and heads: `MeanAttention(layers=None, heads=None)`,
        `AttentionRollout()`, or `EveryHead()`, which gives f32[L, heads, A, N, g, g] a row.

    Raises:
      InvalidImageError: if the batch has no pictures.
      InvalidPromptError: for answers that do not match the rows, or tokens that the model lacks.
      ConfigError: for layers or heads that the model lacks.
    """
    images = _images(batch)
    rows = images.shape[0]
    row_mask = np.ones(rows, bool) if batch.row_mask is None else np.asarray(batch.row_mask)
    real = np.flatnonzero(row_mask)
    _check(answers, real.size, model.config.llm.vocab_size)
    spoken: list[Sequence[int]] = [()] * rows
    for row, answer in zip(real, answers, strict=True):
        spoken[row] = answer
    text, queries = _with_answers(batch, spoken)
    patches = model.config.img.num_patches
    keys = images.shape[1] * patches
    seen = _look(
        model,
        jnp.asarray(images),
        *map(jnp.asarray, text),
        jnp.asarray(keys + queries),
        summary=summary,
    )
    seen = np.asarray(seen)
    side = model.config.img.image_size // model.config.img.patch_size
    shape = (images.shape[1], side, side)
    cut = [seen[row][..., : len(spoken[row]), :] for row in real]
    return [weights.reshape(*weights.shape[:-1], *shape) for weights in cut]


@functools.partial(Jitted, static_argnames=("summary",))
def _look(
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

    def see(seen: Any, weights: jax.Array, layer: Layer) -> Any:
        return summary.see(region, seen, weights, layer)

    start = summary.start(model.config.llm, region)
    _, seen = model.watch(encoded, tokens, mask_ar, mask_input, see, start)
    return summary.finish(region, seen)


def _with_answers(
    batch: Batch, answers: Sequence[Sequence[int]]
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Tokens, mask_ar and mask_input with each answer behind its prompt; text places to look from.

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


def _images(batch: Batch) -> np.ndarray:
    images = None if batch.images is None else np.asarray(batch.images)
    if images is None or images.shape[1] == 0:
        raise InvalidImageError(
            "The batch has no pictures, so there is nothing to look at. Prompts with one picture "
            "or several fit. Call processor([image], [prompt])"
        )
    return images


def _check(answers: Sequence[Sequence[int]], rows: int, vocab_size: int) -> None:
    if len(answers) != rows:
        raise InvalidPromptError(
            f"{len(answers)} answers do not go with {rows} prompts. The tokens of one answer for "
            "each prompt fit. Take them from the rows of generate(model, batch): row.tokens"
        )
    for number, answer in enumerate(answers):
        strange = [token for token in answer if not 0 <= token < vocab_size]
        if strange:
            raise InvalidPromptError(
                f"Token {strange[0]} of answers[{number}] is unknown to the model. Ids from 0 to "
                f"{vocab_size - 1} fit. Make them with: tokenizer.encode(text)"
            )
