"""A tiny model over meshes of 8 devices: run by test_devices.py in a process of its own.

python -m tests.generation.meshes STORE
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import paligemma_jax as pg
from paligemma_jax.models import sharding
from paligemma_jax.models.sharding import Axes, make_mesh

QUESTIONS = ["answer en what?", "caption en", "count cats", "ocr"]


def split_everything(setattr: Callable[..., Any]) -> None:
    """The models of tests are small: here everything that can be split is."""
    setattr(sharding, "MIN_BYTES", 0)  # noqa: B010


def pictures(count: int) -> list[np.ndarray]:
    """Noise of 8 pixels a side."""
    return list(np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), np.uint8))


def answers(pali: pg.Pipeline, few: bool = False) -> dict[str, Any]:
    """What a pipeline says about noise, by all its ways to say something."""
    images = pictures(4)
    made = pali.generate(images, QUESTIONS, max_new_tokens=6)
    found: dict[str, Any] = {
        "tokens": [list(x.tokens) for x in made],
        "logprobs": [list(x.logprobs) for x in made],
    }
    if few:
        return found
    found["scores"] = [x.logprob for x in pali.score(images[0], QUESTIONS[0], ["red", "green"])]
    boxes = pali.detect_batch(images[:1], "cat", max_objects=1, max_new_tokens=8)[0]
    found["boxes"] = np.asarray(boxes.xyxy).tolist()
    found["stream"] = "".join(map(str, pali.stream(images[0], QUESTIONS[1], max_new_tokens=6)))
    seen = pali.encode(images[0])
    found["encoded"] = pali.generate([seen], ["caption en"], max_new_tokens=6)[0].text
    return found


def compare(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Equal words, and nearly equal numbers."""
    assert found.keys() <= expected.keys()
    for name, value in found.items():
        if name in ("logprobs", "scores"):
            for a, b in zip(value, expected[name], strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4, rtol=0, err_msg=name)
        else:
            assert value == expected[name], name


def main() -> None:
    """Prints how many meshes answer as one device."""
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
    split_everything(setattr)
    store, done = sys.argv[1], 0
    one = answers(pg.from_pretrained(store, dtype="float32"))
    for axes in (Axes(tensor=2), Axes(tensor=4), Axes(fsdp=8), Axes(data=2, fsdp=2, tensor=2)):
        mesh = make_mesh(axes, jax.devices()[: int(np.prod(axes.sizes))])
        pali = pg.from_pretrained(store, dtype="float32", mesh=mesh)
        compare(one, answers(pali, few=axes.data == 1))
        done += 1
    few_bits = (
        ("int8", Axes(tensor=2, fsdp=4)),
        (pg.Int4(8), Axes(tensor=2, fsdp=2, data=2)),
        ("int4", Axes(tensor=4, fsdp=2)),
    )
    for quantization, axes in few_bits:
        alone = answers(pg.from_pretrained(store, dtype="float32", quantize=quantization), few=True)
        pali = pg.from_pretrained(store, dtype="float32", quantize=quantization, mesh=axes)
        compare(alone, answers(pali, few=True))
        done += 1
    print(json.dumps({"same": done}))


if __name__ == "__main__":
    main()
