"""What rounding a model's weights changes: memory, speed, distributions, and scores."""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.demo.agreement import Agreement, agreement, ask, texts
from paligemma_jax.demo.evaluate import evaluate
from paligemma_jax.demo.render import render
from paligemma_jax.demo.splits import TRAINING, held_out_scenes
from paligemma_jax.generation.loop import decode
from paligemma_jax.generation.prefix import read_prefix
from paligemma_jax.generation.sampling import Greedy
from paligemma_jax.models.calibration import measure_inputs
from paligemma_jax.models.quantization import quantize
from paligemma_jax.pipeline import Pipeline

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

    def losses(self, recipe: str) -> dict[str, float]:
        """Points out of 100 that each score falls by; below 0 where it rises."""
        before, after = self.forms[BEFORE].scores, self.forms[recipe].scores
        return {name: 100 * (before[name] - after[name]) for name in before}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        for name in list(self.forms)[1:] if self.scenes else []:
            found["forms"][name]["largest_loss"] = max(self.losses(name).values())
        return found


def report(
    pipeline: Pipeline,
    recipes: Sequence[str],
    *,
    scenes: int,
    prompts: int,
    calibrate: int = 0,
    seed: int = 2026,
) -> QuantizationReport:
    """Measures a model that is not quantized, and then by each recipe's name.

    `scenes` (and as many pairs) are for the demo benchmark, 0 leaves it out; `prompts` are those
    whose answers, the model's own, are compared token by token. Recipes of 4 bits are measured once
    more, as `CALIBRATED`, by what weights are multiplied with in so many prompts as `calibrate`
    about other scenes.
    """
    answered = ask(pipeline, prompts, seed + 3)
    forms: dict[str, Measured] = {}
    inputs = None
    if calibrate and "int4" in recipes:
        inputs = measure_inputs(pipeline.model, texts(ask(pipeline, calibrate, seed + 5, TRAINING)))
        recipes = (*recipes, CALIBRATED)
    for name in (BEFORE, *recipes):
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


def goal(recipe: str) -> float:
    """Points that no score may fall by with a recipe, out of 100."""
    return GOALS.get(recipe, _OTHERS)


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
        logits, cache = jax.block_until_ready(read_prefix(pipeline.model, batch, room=_NEW_TOKENS))
        began = time.perf_counter()
        found = decode(
            pipeline.model,
            cache,
            logits,
            jnp.ones(1, bool),
            jnp.zeros(1, jnp.uint32),
            jnp.asarray(_NEW_TOKENS, jnp.int32),
            sampler=Greedy(),
            capacity=_NEW_TOKENS,
            eos_id=-1,
        )
        np.asarray(found[0])
        took.append(time.perf_counter() - began)
    return (_NEW_TOKENS - 1) / statistics.median(took[1:])
