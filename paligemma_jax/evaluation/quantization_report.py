"""What quantizing a model's weights costs: memory, speed, token distributions, and demo scores.

Letters: B sequences, T text tokens, V vocabulary.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import HELD_OUT, TRAINING, held_out_scenes, sample_scene, split_rng
from paligemma_jax.demo.tasks import examples
from paligemma_jax.evaluation.demo import evaluate_demo
from paligemma_jax.models.gptq import Texts, measure_inputs
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization import quantize
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.image import load_image

BEFORE, CALIBRATED = "before", "int4 calibr."
# Points that no score may fall by, out of 100, by quantization config.
_MAX_LOSS = {"int8": 0.5, "int8-dynamic": 0.5, "float8": 0.5}
_MAX_NEW_TOKENS = 48
_BATCH_SIZE = 8
_IMAGE_SIZE = 224  # pixels
_TIMED_TOKENS, _REPEATS = 64, 5


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How close two models are on the same texts, over `tokens` generated tokens.

    `divergence` is the mean Kullback-Leibler divergence in nats from the first model to the second,
    `top1_agreement` the fraction of tokens for which both have the same most likely one.
    """

    divergence: float
    top1_agreement: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant of the model.

    Attributes:
      nbytes, text_nbytes: of all weights, and of the language model's.
      tokens_per_second: of one sequence, on this machine and while this was measured.
      agreement: with the model before; None for that one itself.
      scores: of the demo task, in 0..1; empty where it was not run.
    """

    nbytes: int
    text_nbytes: int
    tokens_per_second: float
    agreement: Agreement | None
    scores: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """Every variant by its name, `BEFORE` first; `scenes` is what scores are over."""

    dtype: str
    scenes: int
    variants: Mapping[str, Variant]

    def losses(self, name: str) -> dict[str, float]:
        """Points out of 100 that each score of a variant falls by; below 0 where it rises."""
        before, after = self.variants[BEFORE].scores, self.variants[name].scores
        return {score: 100 * (before[score] - after[score]) for score in before}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        for name in list(self.variants)[1:] if self.scenes else []:
            found["variants"][name]["largest_loss"] = max(self.losses(name).values())
        return found


def max_loss(name: str) -> float:
    """Points that no score of a variant may fall by, out of 100."""
    return _MAX_LOSS.get(name, 2.0)


def report(
    pipeline: Pipeline,
    configs: Sequence[str],
    *,
    scenes: int,
    prompts: int,
    calibrate: int = 0,
    seed: int = 2026,
) -> QuantizationReport:
    """Measures a model that is not quantized, and then with each quantization config.

    Args:
      pipeline: the model.
      configs: names such as "int8" and "int4".
      scenes: scenes (and as many pairs) of the demo task; 0 leaves it out.
      prompts: prompts whose answers, the model's own, are compared token by token.
      calibrate: prompts about other scenes on which int4 is also measured calibrated, as
        `CALIBRATED`; 0 leaves it out.
      seed: of the scenes.
    """
    texts = _generated(pipeline, prompts, seed + 3, HELD_OUT)
    inputs = None
    if calibrate and "int4" in configs:
        calibration = _generated(pipeline, calibrate, seed + 5, TRAINING)
        whole = [texts for texts, counted in calibration if counted.any(axis=1).all()]
        inputs = measure_inputs(pipeline.model, whole)
        configs = (*configs, CALIBRATED)
    variants: dict[str, Variant] = {}
    for name in (BEFORE, *configs):
        model = pipeline.model
        if name == CALIBRATED:
            model = quantize(model, "int4", inputs=inputs)
        elif name != BEFORE:
            model = quantize(model, name)
        changed = dataclasses.replace(pipeline, model=model)
        agreement = None if name == BEFORE else _agreement(pipeline.model, model, texts)
        speed = _tokens_per_second(changed)
        done = evaluate_demo(changed, scenes, seed).scores if scenes else {}
        scores = {score: interval.value for score, interval in done.items()}
        variants[name] = Variant(_nbytes(model), _nbytes(model.llm), speed, agreement, scores)
    return QuantizationReport(jnp.dtype(pipeline.model.dtype).name, scenes, variants)


# Prompts with a model's own greedy answers, and which tokens bool[B, T] are followed by one of the
# answer. A batch that cannot be filled repeats texts, none of whose tokens count.
_Batches = list[tuple[Texts, np.ndarray]]


def _generated(pipeline: Pipeline, count: int, seed: int, split: int) -> _Batches:
    """So many prompts of all tasks about scenes of a split, and the model's answers to them."""
    asked: list[tuple[np.ndarray, str]] = []
    for i in range(-(-count // 4)):  # more than are needed
        scene = sample_scene(split_rng(seed, split, i))
        image = render(scene, _IMAGE_SIZE)
        words = [e.prompt for e in examples(scene, split_rng(seed + 1, split, i))]
        words += [f"segment {scene.shapes[0].name}"] if scene.shapes else []
        asked += [(image, prompt) for prompt in words]
    images, prompts = zip(*asked[:count], strict=True)
    answers = pipeline.generate(
        images, prompts, max_new_tokens=_MAX_NEW_TOKENS, batch_size=_BATCH_SIZE
    )
    processor = pipeline.processor
    texts = [
        processor.encode_train(prompt, answer.text, processor.max_text_length)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    length = max(int(np.flatnonzero(text["mask_loss"])[-1]) for text in texts)
    batches = []
    for start in range(0, len(texts), _BATCH_SIZE):
        places = np.arange(start, start + _BATCH_SIZE)
        part = [texts[place % len(texts)] for place in places]
        pixels = [processor.image.preprocess(load_image(images[p % len(texts)])) for p in places]
        tokens, mask_ar, loss = (
            np.stack([text[name][: length + 1] for text in part])
            for name in ("text", "mask_ar", "mask_loss")
        )
        real = (places < len(texts))[:, None]
        last = length - np.argmax(loss[:, ::-1] > 0, axis=1)  # token of each answer
        read = (np.arange(length) < last[:, None]) & real
        inputs = (np.stack(pixels)[:, None], tokens[:, :-1], mask_ar[:, :-1], read)
        batches.append((Texts(*map(jnp.asarray, inputs)), (loss[:, 1:] > 0) & real))
    return batches


def _agreement(first: PaliGemma, second: PaliGemma, batches: _Batches) -> Agreement:
    """Both models read the same answers; neither generates any."""
    divergence, same, count = 0.0, 0, 0
    for texts, counted in batches:
        found = _compare(first, second, texts.images, texts.tokens, texts.mask_ar)
        kl, equal = map(np.asarray, found)
        divergence += float(kl[counted].sum())
        same += int(equal[counted].sum())
        count += int(counted.sum())
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

    def of_sequence(both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # A sequence at a time: logits of published models are a megabyte a token.
        a, b = (
            jax.nn.log_softmax(model.llm.logits(one[None])[0])
            for model, one in zip((first, second), both, strict=True)
        )
        same = jnp.argmax(a, axis=1) == jnp.argmax(b, axis=1)
        return jnp.sum(jnp.exp(a) * (a - b), axis=1), same.astype(jnp.float32)

    return jax.lax.map(of_sequence, (hidden(first), hidden(second)))


def _nbytes(tree: Any) -> int:
    def bits(leaf: jax.Array) -> int:
        integer = jnp.issubdtype(leaf.dtype, jnp.integer)
        return jnp.iinfo(leaf.dtype).bits if integer else 8 * leaf.dtype.itemsize

    return sum(leaf.size * bits(leaf) // 8 for leaf in jax.tree.leaves(tree))


def _tokens_per_second(pipeline: Pipeline) -> float:
    """Of one sequence, the prompt not counted; the best of a few runs."""
    image = render(held_out_scenes(0, 1)[0], _IMAGE_SIZE)

    def seconds(tokens: int) -> float:
        took = []
        for _ in range(1 + _REPEATS):  # the first compiles
            began = time.perf_counter()
            pipeline.generate([image], ["caption en"], max_new_tokens=tokens, min_new_tokens=tokens)
            took.append(time.perf_counter() - began)
        return min(took[1:])

    return _TIMED_TOKENS / max(seconds(1 + _TIMED_TOKENS) - seconds(1), 1e-9)
