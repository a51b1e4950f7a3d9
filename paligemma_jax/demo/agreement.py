"""How close two models are on the same pictures: their distributions after every token.

Letters: B rows, T text tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import sample_scene
from paligemma_jax.demo.splits import HELD_OUT, split_rng
from paligemma_jax.demo.tasks import examples
from paligemma_jax.models.calibration import Texts
from paligemma_jax.models.jitted import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.image import load_image

MAX_NEW_TOKENS = 48
_ROWS = 8  # at once
_PICTURE_SIZE = 224  # pixels


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Mean over answer tokens: Kullback-Leibler divergence in nats from the first model to the
    second, and the share where both hold the same token for the likeliest."""

    divergence: float
    same_token: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Answered:
    """Prompts about pictures with a model's own greedy answers, as arrays for reading them again.

    Attributes:
      images: f32[B, 1, height, width, 3].
      text, mask_ar: i32[B, T + 1]; `counts` i32[B, T + 1] is 1 at tokens of the answer.
    """

    images: np.ndarray
    text: np.ndarray
    mask_ar: np.ndarray
    counts: np.ndarray


def ask(pipeline: Pipeline, prompts: int, seed: int, split: int = HELD_OUT) -> Answered:
    """So many prompts of all tasks about scenes of a split, and the model's answers to them."""
    asked: list[tuple[np.ndarray, str]] = []
    for i in range(-(-prompts // 4)):  # more than are needed
        scene = sample_scene(split_rng(seed, split, i))
        picture = render(scene, _PICTURE_SIZE)
        words = [e.prompt for e in examples(scene, split_rng(seed + 1, split, i))]
        words += [f"segment {scene.shapes[0].name}"] if scene.shapes else []
        asked += [(picture, prompt) for prompt in words]
    asked = asked[:prompts]
    pictures = [picture for picture, _ in asked]
    answers = pipeline.generate(
        pictures, [prompt for _, prompt in asked], max_new_tokens=MAX_NEW_TOKENS, batch_size=_ROWS
    )
    processor = pipeline.processor
    length = processor.max_text_length
    rows = [
        processor.encode_train(prompt, answer.text, length)
        for (_, prompt), answer in zip(asked, answers, strict=True)
    ]
    used = max(int(np.flatnonzero(row["mask_loss"])[-1]) for row in rows) + 1
    arrays = {name: np.stack([row[name][:used] for row in rows]) for name in rows[0]}
    images = np.stack([processor.image.preprocess(load_image(picture)) for picture in pictures])
    return Answered(images[:, None], arrays["text"], arrays["mask_ar"], arrays["mask_loss"])


def texts(answered: Answered) -> Iterator[Texts]:
    """For `measure_inputs`; rows that would not fill a batch are left out."""
    for start in range(0, len(answered.text) - _ROWS + 1, _ROWS):
        rows = slice(start, start + _ROWS)
        last = answered.text.shape[1] - np.argmax(answered.counts[rows, ::-1] > 0, axis=1)
        yield Texts(
            jnp.asarray(answered.images[rows]),
            jnp.asarray(answered.text[rows]),
            jnp.asarray(answered.mask_ar[rows]),
            jnp.arange(answered.text.shape[1])[None] < jnp.asarray(last)[:, None],
        )


def agreement(first: PaliGemma, second: PaliGemma, answered: Answered) -> Agreement:
    """Both models read the same answers; neither writes any."""
    divergence, same, count = 0.0, 0, 0
    for start in range(0, len(answered.text), _ROWS):
        # The last rows come again where too few are left; one program serves all.
        rows = np.arange(start, start + _ROWS) % len(answered.text)
        real = (answered.counts[rows, 1:] > 0) & (
            np.arange(start, start + _ROWS) < len(answered.text)
        )[:, None]
        found = _compare(
            first,
            second,
            jnp.asarray(answered.images[rows]),
            jnp.asarray(answered.text[rows, :-1]),
            jnp.asarray(answered.mask_ar[rows, :-1]),
        )
        kl, equal = map(np.asarray, found)
        divergence += float(kl[real].sum())
        same += int(equal[real].sum())
        count += int(real.sum())
    return Agreement(divergence / count, same / count, count)


@Jitted
def _compare(
    first: PaliGemma,
    second: PaliGemma,
    images: Float[Array, "B 1 height width 3"],
    tokens: Int[Array, "B T"],
    mask_ar: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    def hidden(model: PaliGemma) -> jax.Array:
        return model.hidden(model.encode_images(images), tokens, mask_ar)

    def of_row(rows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # A row at a time: logits of published models are a megabyte a token.
        a, b = (
            jax.nn.log_softmax(model.llm.logits(row[None])[0])
            for model, row in zip((first, second), rows, strict=True)
        )
        same = jnp.argmax(a, axis=1) == jnp.argmax(b, axis=1)
        return jnp.sum(jnp.exp(a) * (a - b), axis=1), same.astype(jnp.float32)

    return jax.lax.map(of_row, (hidden(first), hidden(second)))
