"""The baseline of the benchmark does the same work as we do: pytest -m parity"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_jax.benchmark import Precision
from paligemma_jax.benchmark.huggingface import load_huggingface, model_inputs
from paligemma_jax.benchmark.ours import load_ours
from paligemma_jax.benchmark.random_checkpoint import write_checkpoint
from paligemma_jax.benchmark.subjects import TINY
from paligemma_jax.config import GemmaConfig, PaliGemmaConfig
from paligemma_jax.errors import ConfigError

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


PROCESSOR = Path(__file__).parents[1] / "golden" / "processing" / "huggingface"
GEMMA = dataclasses.replace(TINY.llm, width=256)  # wide enough for outputs that do not repeat
GEMMA2 = dataclasses.replace(GEMMA, num_kv_heads=2, post_norms=True, attn_logit_softcap=50.0)
BATCH, NEW = 3, 24


def model_of(llm: GemmaConfig) -> PaliGemmaConfig:
    return dataclasses.replace(TINY, llm=llm)


@pytest.fixture(params=[GEMMA, GEMMA2], ids=["paligemma", "paligemma2"])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "weights", model_of(request.param), dtype="float32")


@pytest.fixture
def weights1(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "weights", model_of(GEMMA), dtype="float32")


def inputs(batch: int = BATCH, length: int = 9) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    size = TINY.img.image_size
    images = random.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)
    return images, random.integers(4, TINY.llm.vocab_size, (batch, length)).astype(np.int32)


def test_same_outputs_as_ours(weights: Path):
    ours, baseline = load_ours(weights, Precision.FLOAT32), load_huggingface(weights, "float32")
    mine, theirs = ours.logits(inputs()), baseline.logits(inputs())
    np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)
    assert 1 < np.abs(theirs).max() < 10
    outputs = baseline.generate(inputs(), NEW)()
    np.testing.assert_array_equal(ours.generate(inputs(), NEW)(), outputs)
    # Answers are of many tokens and differ by image, so that their equality says something.
    assert len(np.unique(outputs)) > outputs.size / 3
    assert len({tuple(output) for output in outputs}) == BATCH


def test_outputs_depend_on_the_image(weights: Path):
    images, tokens = inputs()
    baseline = load_huggingface(weights, "float32")
    shown, swapped = (baseline.logits((i, tokens)) for i in (images, images[::-1]))
    assert np.abs(shown - swapped).max() > 0.1


def test_first_token_begins_the_answer(weights: Path):
    baseline = load_huggingface(weights, "float32")
    first, answer = baseline.first_token(inputs()), baseline.generate(inputs(), 2)
    np.testing.assert_array_equal(first(), answer()[:, 0])
    np.testing.assert_array_equal(first(), baseline.logits(inputs()).argmax(-1))
    assert first().dtype == answer().dtype == np.int32
    baseline.encode_images(inputs()[0])()
    assert baseline.peak_bytes() > 2**20


def test_bfloat16(weights: Path):
    exact = load_huggingface(weights, "float32").logits(inputs())
    rounded = load_huggingface(weights, "bfloat16").logits(inputs())
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.3


def test_inputs_are_the_processors(tmp_path: Path):
    processor: Any = transformers.PaliGemmaProcessor.from_pretrained(PROCESSOR)
    vocabulary = processor.image_token_id
    config = dataclasses.replace(
        TINY,
        img=dataclasses.replace(TINY.img, image_size=28),
        llm=dataclasses.replace(TINY.llm, vocab_size=vocabulary),
    )
    baseline = load_huggingface(write_checkpoint(tmp_path / "weights", config), "float32")
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3)).astype(np.uint8)
    wanted = processor(images=image, text="<image>caption en", return_tensors="pt")
    # Its own answer to it is all prefix and no padding.
    tokens = wanted["input_ids"][:, config.img.num_patches :].numpy().astype(np.int32)
    pixels = image[None].astype(np.float32) / 127.5 - 1
    given = model_inputs(baseline._model, (pixels, tokens))
    assert set(given) == set(wanted) - {"labels"}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert given[name].dtype == wanted[name].dtype
        np.testing.assert_array_equal(given[name].numpy(), wanted[name].numpy())
    np.testing.assert_allclose(
        given["pixel_values"].numpy(), wanted["pixel_values"].numpy(), atol=1e-6
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_gives_the_same(weights1: Path):
    prompts = inputs(batch=1, length=4)
    compiled = load_huggingface(weights1, "float32", compiled=True)
    eager = load_huggingface(weights1, "float32")
    np.testing.assert_array_equal(compiled.generate(prompts, 8)(), eager.generate(prompts, 8)())


def test_failure_of_the_compiler_is_explained(weights1: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand much more")

    compiled = load_huggingface(weights1, "float32", compiled=True)
    monkeypatch.setattr(compiled, "_forward", fail)
    with pytest.raises(ConfigError, match=r"\(RuntimeError: no compiler\)"):
        compiled.first_token(inputs())()
