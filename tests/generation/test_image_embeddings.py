"""Pictures encoded once for many prompts, and several images or frames a prompt."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.errors import ConfigError, InvalidImageError, InvalidPromptError
from paligemma_jax.generation import image_embeddings as encoding
from paligemma_jax.generation.decode import prefill_encoded, read_prompts
from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.image_embeddings import (
    EncodedImages,
    encode,
    prompt_batches,
    stack,
)
from paligemma_jax.generation.scoring import classify, score
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.processing.processor import Batch
from tests.goldens import (
    assert_close,
    big_vision,
    optimized,
    prompt,
    until_eos,
)
from tests.tiny import GEMMA, GEMMA2, SIGLIP, random_model, tiny_config

TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "demo" / "tokenizer.model"
PATCHES = SIGLIP.num_patches
QUESTIONS = ["ocr", "caption en", "answer en how many red circles are there?"]


@pytest.fixture(scope="module")
def processor() -> pg.Processor:
    return pg.Processor(pg.Tokenizer.from_file(TOKENIZER), ImagePreprocessing(SIGLIP.image_size))


@pytest.fixture(scope="module")
def model(processor: pg.Processor) -> pg.PaliGemma:
    return random_model(tiny_config(GEMMA, vocab_size=processor.tokenizer.vocab_size))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (20, 30 + i, 3)).astype(np.uint8) for i in range(3)]


@pytest.fixture
def encoder_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the encoder had."""
    sizes: list[int] = []
    real = encoding._encode  # noqa: SLF001

    def count(model, images):
        sizes.append(len(images))
        return real(model, images)

    monkeypatch.setattr(encoding, "_encode", count)
    return sizes


def prepare(model, processor, images, prompts) -> tuple[Batch, jax.Array | None]:
    """The one batch of prompts with equally many images."""
    (batch,) = prompt_batches(model, processor, images, prompts)
    return batch.batch, batch.image_tokens


def logits_of(model, batch: Batch, image_tokens: jax.Array | None = None) -> np.ndarray:
    rows = np.asarray(batch.row_mask)
    return np.asarray(read_prompts(model, batch, image_tokens)[0])[rows]


def test_answers_as_with_the_images_themselves(model, processor, images):
    both = images[:2]
    first = logits_of(model, processor([both] * 3, QUESTIONS))
    batch, tokens = prepare(model, processor, [encode(model, processor.image, both)] * 3, QUESTIONS)
    assert batch.images is None and tokens is not None and tokens.shape[:2] == (4, 2 * PATCHES)
    assert_close(logits_of(model, batch, tokens), first, atol=1e-5)


def test_what_is_kept(model, processor, images):
    kept = encode(model, processor.image, images)
    assert len(kept) == 3 and kept.sizes == ((30, 20), (31, 20), (32, 20))
    assert kept.tokens.shape == (3 * PATCHES, model.config.llm.width)
    assert repr(kept) == "EncodedImages(3 images, tokens float32[12x16])"
    assert encode(model, processor.image, kept) is kept
    one = encode(model, processor.image, images[1])
    assert_close(one.tokens, kept.tokens[PATCHES : 2 * PATCHES], atol=1e-5)


def test_a_shared_image_is_encoded_once(model, processor, images, encoder_sizes):
    batch, tokens = prepare(model, processor, [images[0]] * 3, QUESTIONS)
    assert encoder_sizes == [1] and tokens is not None
    expected = logits_of(model, processor([images[0]] * 3, QUESTIONS))
    assert_close(logits_of(model, batch, tokens), expected, atol=1e-5)
    kept = encode(model, processor.image, images[0])
    del encoder_sizes[:]
    batch, tokens = prepare(model, processor, [kept, images[1], kept], QUESTIONS)
    assert encoder_sizes == [1] and tokens is not None
    expected = logits_of(model, processor([images[i] for i in (0, 1, 0)], QUESTIONS))
    assert_close(logits_of(model, batch, tokens), expected, atol=1e-5)


def test_different_images_stay_images(model, processor, images, encoder_sizes):
    batch, tokens = prepare(model, processor, images, QUESTIONS)
    assert tokens is None and batch.images is not None and encoder_sizes == []
    batch, tokens = prepare(model, processor, [None, None], QUESTIONS[:2])
    assert tokens is None and batch.images is None


def test_frames_go_in_groups_and_repeated_ones_once(model, processor, images, encoder_sizes):
    clip = [images[i % 3] for i in range(16)]
    kept = encode(model, processor.image, clip)
    assert encoder_sizes == [4] and len(kept) == 16
    images = jnp.asarray(np.stack([processor.image(frame) for frame in clip]))[None]
    assert_close(kept.tokens, model.encode_images(images)[0], atol=1e-5)
    del encoder_sizes[:]
    encode(model, processor.image, [image.copy() for image in clip[:11]])
    assert encoder_sizes == [8, 4]


def test_keys_and_values_of_a_image_depend_on_the_prompt(model, processor, images):
    """From the second layer on: why image tokens can be kept, and their keys and values cannot."""
    kept = encode(model, processor.image, images[0])
    caches = []
    for question in QUESTIONS[:2]:
        batch, tokens = prepare(model, processor, [kept], [question])
        caches.append(read_prompts(model, batch, tokens)[1])
    for layer in range(model.config.llm.depth):
        for a, b in zip(caches[0].read(layer), caches[1].read(layer), strict=True):
            difference = np.abs(np.asarray(a - b)[0, :, :PATCHES]).max()
            assert difference > 1e-3 if layer else difference == 0


def test_batches_of_equally_many_images(model, processor, images):
    kept = encode(model, processor.image, images)
    entries = [kept, None, images[0], images, (images[0],)]
    batches = list(prompt_batches(model, processor, entries, ["ocr"] * 5))
    assert [batch.indices for batch in batches] == [[0, 3], [1], [2, 4]]
    assert [batch.sizes for batch in batches][1:] == [[()], [((30, 20),)] * 2]
    small = prompt_batches(model, processor, entries, ["ocr"] * 5, batch_size=1)
    assert [batch.indices for batch in small] == [[0], [3], [1], [2], [4]]


def test_what_cannot_be_encoded(model, processor, images):
    with pytest.raises(InvalidImageError, match="at least one, got none"):
        encode(model, processor.image, [])
    for entries in ([images[0], 3, images[0]], [images[0], 3, images[1]]):
        with pytest.raises(InvalidImageError, match=r"images\[1\]: "):
            prepare(model, processor, entries, QUESTIONS)
    kept = encode(model, processor.image, images[0])
    other = dataclasses.replace(kept, config=tiny_config(GEMMA2))
    with pytest.raises(ConfigError, match="another architecture"):
        prepare(model, processor, [other], QUESTIONS[:1])
    with pytest.raises(ConfigError, match="each of 4 sequences, got 2"):
        read_prompts(model, processor(None, QUESTIONS), stack([kept], 2))
    wrong: list[Any] = [0, 1.5, True]
    for size in wrong:
        with pytest.raises(ConfigError, match="batch_size: expected"):
            list(prompt_batches(model, processor, None, ["ocr"], batch_size=size))


def test_questions_about_one_image_compile_two_programs(model, processor, images):
    kept = encode(model, processor.image, images[0])
    count = getattr(prefill_encoded, "_cache_size")  # noqa: B009
    before = count()
    for words in range(1, 12):
        batch, tokens = prepare(model, processor, [kept], ["ocr " * words])
        read_prompts(model, batch, tokens)
    assert count() - before <= 2  # text of 16 and of 32 tokens


def test_scores_of_text(model, processor, images):
    kept = encode(model, processor.image, images[0])
    entries = [images[0], None, kept, images]
    candidates = [["yes", "no"], ["3", "", "two stars"], ["no", "yes"], ["yes"]]
    asked = [*QUESTIONS, "ocr"]
    asked[2] = asked[0]
    scored = score(model, processor, entries, asked, candidates)
    assert [[a.text for a in row] for row in scored] == candidates
    eos = processor.tokenizer.eos_id
    for row in scored:
        for a in row:
            assert list(a.tokens) == [*processor.tokenizer.encode(a.text), eos]
            assert a.length == len(a.logprobs) and a.logprob < 0
    assert_close([a.logprob for a in scored[0]], [a.logprob for a in scored[2]][::-1], atol=1e-5)
    split = score(model, processor, entries, asked, candidates, batch_size=1)
    assert_close(
        [a.logprob for row in scored for a in row],
        [a.logprob for row in split for a in row],
        atol=1e-5,
    )
    assert sum(classify(scored[0]).probabilities) == pytest.approx(1)


def test_candidates_that_do_not_fit(model, processor, images):
    def ask(*candidates, prompts=("ocr",)):
        return score(model, processor, [images[0]], list(prompts), list(candidates))

    with pytest.raises(InvalidPromptError, match="at least one answer"):
        ask([])
    with pytest.raises(InvalidPromptError, match="got 'yes'"):
        ask("yes")
    with pytest.raises(InvalidPromptError):
        ask([3])
    with pytest.raises(InvalidPromptError, match="each of 1 prompts, got 2"):
        ask(["yes"], ["no"])
    with pytest.raises(InvalidPromptError, match="each of 2 prompts"):
        ask(["yes"], prompts=("ocr", "ocr"))


def test_several_images_answer_as_big_vision_does():
    """Through batch and `generate`, from pixels and from encoded images."""
    golden = big_vision("pg1_multi")
    images, tokens, mask_ar, mask_input = prompt(golden)
    model = golden.model()
    batch = Batch(images=images, tokens=tokens, mask_ar=mask_ar, mask_input=mask_input.astype(bool))
    kept = until_eos(golden["greedy_tokens"])
    wanted = [row[keep].tolist() for row, keep in zip(golden["greedy_tokens"], kept, strict=True)]
    with optimized():
        answers = generate(model, batch, max_new_tokens=8)
        pixels, _ = read_prompts(model, batch)
        flat = model.encode_images(images)
        rows = [EncodedImages(row, ((1, 1),) * images.shape[1], model.config) for row in flat]
        encoded, _ = read_prompts(
            model, dataclasses.replace(batch, images=None), stack(rows, len(rows))
        )
    assert [list(answer.tokens) for answer in answers] == wanted
    for answer, logprobs in zip(answers, golden["greedy_logp"], strict=True):
        assert_close(answer.logprobs, logprobs[: len(answer.logprobs)], golden.atol)
    assert_close(encoded, pixels, golden.atol)
    assert images.shape[1] > 1
