"""What rounding a model's weights changes: memory, speed, distributions, and scores.

How close two models are on the same pictures: their distributions after every token.

Letters: B rows, T text tokens, V vocabulary.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import HELD_OUT, TRAINING, held_out_scenes, sample_scene, split_rng
from paligemma_jax.demo.tasks import examples
from paligemma_jax.evaluation.demo import evaluate
from paligemma_jax.generation.decode import DecodePlan, decode, read_prompts
from paligemma_jax.models.gptq import Texts, measure_inputs
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization import quantize
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


BEFORE, CALIBRATED = "before", "int4 calibr."
# Points that no score may fall by, out of 100.
GOALS = {"int8": 0.5, "int8-dynamic": 0.5, "float8": 0.5, "int4": 2.0, CALIBRATED: 2.0}
_OTHERS = 2.0
_NEW_TOKENS, _REPEATS = 64, 3


@dataclasses.dataclass(frozen=True)
class Measured:
    """One form of the model.

    Attributes:
      nbytes, text_nbytes: of all weights, and of the language model's.
      tokens_per_second: of one answer, on this machine and while this was measured.
      agreement: with the model before; None for that one itself.
      scores: of the demo benchmark, in 0..1; empty where it was not run.
    """

    nbytes: int
    text_nbytes: int
    tokens_per_second: float
    agreement: Agreement | None
    scores: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """Every form by its name, `BEFORE` first; `scenes` is what scores are over."""

    dtype: str
    scenes: int
    forms: Mapping[str, Measured]

    def losses(self, quantization: str) -> dict[str, float]:
        """Points out of 100 that each score falls by; below 0 where it rises."""
        before, after = self.forms[BEFORE].scores, self.forms[quantization].scores
        return {name: 100 * (before[name] - after[name]) for name in before}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        for name in list(self.forms)[1:] if self.scenes else []:
            found["forms"][name]["largest_loss"] = max(self.losses(name).values())
        return found


def report(
    pipeline: Pipeline,
    formats: Sequence[str],
    *,
    scenes: int,
    prompts: int,
    calibrate: int = 0,
    seed: int = 2026,
) -> QuantizationReport:
    """Measures a model that is not quantized, and then by each quantization's name.

    `scenes` (and as many pairs) are for the demo benchmark, 0 leaves it out; `prompts` are those
    whose answers, the model's own, are compared token by token. Recipes of 4 bits are measured once
    more, as `CALIBRATED`, by what weights are multiplied with in so many prompts as `calibrate`
    about other scenes.
    """
    answered = ask(pipeline, prompts, seed + 3)
    forms: dict[str, Measured] = {}
    inputs = None
    if calibrate and "int4" in formats:
        inputs = measure_inputs(pipeline.model, texts(ask(pipeline, calibrate, seed + 5, TRAINING)))
        formats = (*formats, CALIBRATED)
    for name in (BEFORE, *formats):
        model = pipeline.model
        if name == CALIBRATED:
            model = quantize(model, "int4", inputs=inputs)
        elif name != BEFORE:
            model = quantize(model, name)
        form = dataclasses.replace(pipeline, model=model)
        close = None if name == BEFORE else agreement(pipeline.model, model, answered)
        speed = _tokens_per_second(form)
        scores = {k: r.value for k, r in evaluate(form, seed, scenes).items()} if scenes else {}
        forms[name] = Measured(_nbytes(model), _nbytes(model.llm), speed, close, scores)
    return QuantizationReport(jnp.dtype(pipeline.model.dtype).name, scenes, forms)


def goal(quantization: str) -> float:
    """Points that no score may fall by with a quantization, out of 100."""
    return GOALS.get(quantization, _OTHERS)


def _nbytes(tree: Any) -> int:
    def bits(leaf: jax.Array) -> int:
        integer = jnp.issubdtype(leaf.dtype, jnp.integer)
        return jnp.iinfo(leaf.dtype).bits if integer else 8 * leaf.dtype.itemsize

    return sum(leaf.size * bits(leaf) // 8 for leaf in jax.tree.leaves(tree))


def _tokens_per_second(pipeline: Pipeline) -> float:
    """Of one row that never ends, the prompt not counted; the median of a few."""
    picture = render(held_out_scenes(0, 1)[0], 224)
    batch = pipeline.processor([picture], ["caption en"])
    took = []
    for _ in range(1 + _REPEATS):  # the first compiles
        logits, cache = jax.block_until_ready(read_prompts(pipeline.model, batch, room=_NEW_TOKENS))
        began = time.perf_counter()
        plan = DecodePlan.greedy(1, _NEW_TOKENS, eos_token_id=None)
        state = decode(pipeline.model, plan, cache, logits, jnp.ones(1, bool), _NEW_TOKENS)
        np.asarray(state.progress.tokens)
        took.append(time.perf_counter() - began)
    return (_NEW_TOKENS - 1) / statistics.median(took[1:])
