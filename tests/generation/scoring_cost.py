"""Measures scoring 16 candidates that share one prompt against scoring each alone.

    python -m tests.generation.scoring_cost demo
    python -m tests.generation.scoring_cost gemma

`demo` is the demo model; `gemma` has PaliGemma's decoder at full width and vocabulary but 4 layers,
a small image encoder with 256 patches, and random weights. Alone means one forward pass over image,
prompt and candidate for each, compiled once, which is what there is without a shared prefix.
Seconds are the fewest of several runs after compiling.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paligemma_jax as pg
from paligemma_jax.config import VARIANTS, SigLIPConfig
from paligemma_jax.generation.scoring import score_tokens
from paligemma_jax.models.paligemma import PaliGemma, abstract_params, from_params
from paligemma_jax.processing.processor import Batch, bucket

EOS = 1
CANDIDATES = 16
PROMPT = 10  # tokens
LONGEST = 6  # tokens of a candidate, EOS not counted
DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"


def gemma(layers: int) -> PaliGemma:
    """Gemma 2B's width and PaliGemma's vocabulary, random weights in float32."""
    llm = dataclasses.replace(VARIANTS["paligemma-3b-pt-224"].llm, depth=layers)
    img = SigLIPConfig(image_size=224, patch_size=14, width=192, depth=2, mlp_dim=384, num_heads=4)
    config = dataclasses.replace(VARIANTS["paligemma-3b-pt-224"], img=img, llm=llm)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.02)  # noqa: E731
    return from_params(
        config, jax.tree.map(draw, abstract_params(config, jnp.float32)), jnp.float32
    )


def example(model: PaliGemma) -> tuple[Batch, list[list[int]]]:
    """A prompt of 10 tokens about one picture, and 16 answers of 1 to 6 tokens and EOS."""
    rng = np.random.default_rng(0)
    c = model.config
    length = bucket(PROMPT, 16)
    real = np.arange(length)[None] < PROMPT
    size = c.img.image_size
    draw = lambda *shape: rng.integers(3, c.llm.vocab_size, shape).astype(np.int32)  # noqa: E731
    batch = Batch(
        images=rng.uniform(-1, 1, (1, 1, size, size, 3)).astype(np.float32),
        tokens=np.where(real, draw(1, length), 0).astype(np.int32),
        mask_ar=(~real).astype(np.int32),
        mask_input=real,
    )
    answers = [[*draw(1 + i % LONGEST).tolist(), EOS] for i in range(CANDIDATES)]
    return batch, answers


@jax.jit
def forward_logprobs(
    model: PaliGemma, images: Any, tokens: Any, mask_ar: Any, start: Any, targets: Any
) -> Any:
    """Log-probabilities of `targets`, which follow the token at `start`."""
    hidden = model.hidden(model.encode_images(images), tokens, mask_ar)
    hidden = jax.lax.dynamic_slice_in_dim(hidden, start, targets.size, axis=1)
    logprobs = jax.nn.log_softmax(model.llm.logits(hidden)[0])
    return logprobs[jnp.arange(targets.size), targets]


def alone(model: PaliGemma, batch: Batch, answers: list[list[int]]) -> list[np.ndarray]:
    """Each answer by a forward pass of its own; one program for all."""
    found = []
    for answer in answers:
        tokens = np.zeros((1, PROMPT + LONGEST + 1), np.int32)
        tokens[0, :PROMPT] = np.asarray(batch.tokens)[0, :PROMPT]
        tokens[0, PROMPT : PROMPT + len(answer)] = answer
        mask_ar = (np.arange(tokens.size) >= PROMPT).astype(np.int32)[None]
        targets = np.zeros(LONGEST + 1, np.int32)
        targets[: len(answer)] = answer
        arrays = map(jnp.asarray, (batch.images, tokens, mask_ar, PROMPT - 1, targets))
        found.append(np.asarray(forward_logprobs(model, *arrays))[: len(answer)])
    return found


def best(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Fewest seconds, and fewest seconds of processor time, of several calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        function()
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return min(wall for wall, _ in seconds), min(cpu for _, cpu in seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["demo", "gemma"])
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of `gemma`")
    parser.add_argument("--alone", type=int, default=16, help="measure so many, and scale")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.model == "demo":
        model = pg.from_pretrained(DEMO, dtype="float32").model
    else:
        model = gemma(options.layers)
    batch, answers = example(model)
    some = answers[: options.alone]
    shared = score_tokens(model, batch, [answers])[0]  # compiles, as the next line does
    single = alone(model, batch, answers[:1])
    together = best(lambda: score_tokens(model, batch, [answers]), options.repeats)
    apart = best(lambda: alone(model, batch, some), options.repeats)
    apart = [seconds * len(answers) / len(some) for seconds in apart]
    print(f"{CANDIDATES} candidates: seconds, processor seconds")
    print(f"together {together[0]:8.3f} {together[1]:8.3f}")
    print(f"alone    {apart[0]:8.3f} {apart[1]:8.3f}")
    print(f"alone / together {apart[0] / together[0]:.1f} {apart[1] / together[1]:.1f}")
    difference = np.abs(np.subtract(shared[0], single[0])).max()
    print(f"largest difference of a log-probability of the first: {difference:.1e}")


if __name__ == "__main__":
    main()
