"""The pipeline as a user calls it, on a small random model with the demo's vocabulary."""

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.generation.decode import decode_steps, prefill
from paligemma_jax.models.inference_layout import stack_layers
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.models.paligemma import to_params
from paligemma_jax.processing.image import ImagePreprocessing
from tests.tiny import GEMMA, random_model, tiny_config

TOKENIZER = Path(__file__).parents[1] / "checkpoints" / "demo" / "tokenizer.model"


@pytest.fixture(scope="module")
def pali() -> pg.Pipeline:
    tokenizer = pg.Tokenizer.from_file(TOKENIZER)
    config = tiny_config(GEMMA)
    llm = dataclasses.replace(config.llm, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, llm=llm)
    processor = pg.Processor(tokenizer, ImagePreprocessing(config.img.image_size))
    return pg.Pipeline(random_model(config), processor)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    return Image.fromarray(pixels)


def answer_with(monkeypatch, text: str) -> None:
    """Lets the model say `text`, whatever it is asked."""
    said = [pg.Generation(text=text, tokens=(), logprobs=(), finish_reason="eos")]
    monkeypatch.setattr(pg.Pipeline, "generate", lambda *args, **kwargs: said)


def test_tasks_give_text_of_the_tokens(pali, picture):
    caption = pali.caption(picture, language="de")
    assert caption == pali.generate([picture], ["caption de"])[0].text
    assert pali.answer(picture, "why?") == str(pali.generate([picture], ["answer en why?"])[0])
    assert pali.ocr(picture) == pali.generate([picture], ["ocr"])[0].text


def test_a_picture_is_the_same_as_path_bytes_array_and_object(pali, picture, tmp_path):
    picture.save(tmp_path / "p.png")
    data = io.BytesIO()
    picture.save(data, "PNG")
    sources = [picture, np.asarray(picture), tmp_path / "p.png", str(tmp_path / "p.png")]
    answers = {pali.caption(source) for source in [*sources, data.getvalue()]}
    assert len(answers) == 1


def test_many_prompts_compile_few_programs(pali, picture):
    rng = np.random.default_rng(1)
    words = ["red", "circle", "is", "there", "a", "blue", "star"]
    prompts = [f"answer en {' '.join(rng.choice(words, n))}?" for n in rng.integers(1, 40, 50)]
    programs = [getattr(program, "_cache_size") for program in (prefill, decode_steps)]  # noqa: B009
    before = [count() for count in programs]
    for prompt in prompts:
        pali.generate([picture], [prompt], max_new_tokens=int(rng.integers(1, 16)))
    after = [count() for count in programs]
    # Text of 16, 32 and 64 tokens; every answer has room for 16.
    assert after[0] - before[0] <= 3
    assert after[1] - before[1] <= 3


def test_detect_holds_any_model_to_the_labels(pali, picture):
    """This model knows nothing; its answers parse all the same, with a score for every box."""
    one = pali.detect_batch([picture], "cat ; dog", max_new_tokens=24)[0]
    assert (one.width, one.height) == picture.size and not one.unparsed
    assert set(one.labels) <= {"cat", "dog"} and one.scores is not None
    assert all(0 <= score <= 1 for score in one.scores)
    many = pali.detect_batch([picture] * 3, [["cat", "dog"], ["bird"], ["cat"]], max_new_tokens=24)
    assert many[0].boxes == one.boxes and set(many[1].labels) <= {"bird"}
    np.testing.assert_allclose(many[0].scores, one.scores, rtol=1e-4)


def test_detect_of_encoded_pictures_is_that_of_the_pictures(pali, picture):
    encoded = pali.encode(picture)
    ask = dict(labels=["cat"], max_new_tokens=16)
    found = [pali.detect_batch([image], **ask)[0] for image in (encoded, picture)]
    assert found[0].boxes == found[1].boxes and found[0].text == found[1].text


def test_boxes_are_of_one_picture(pali, picture):
    with pytest.raises(pg.InvalidImageError, match="expected one image"):
        pali.detect(pali.encode([picture, picture.rotate(90)]), "cat")


def test_lists_of_labels_for_another_number_of_pictures(pali, picture):
    with pytest.raises(pg.InvalidPromptError, match="1 images, got 2 lists"):
        pali.detect_batch([picture], [["cat"], ["dog"]])


def test_segment_needs_a_codec(pali, picture):
    with pytest.raises(pg.CheckpointError, match=r"vae-oid\.npz"):
        pali.segment(picture, "cat")


def test_segment_gives_a_mask_a_box(pali, picture):
    codec = pg.MaskCodec(MaskVAE(MaskVAEConfig(embedding_dim=8), rngs=nnx.Rngs(0)))
    with_codec = dataclasses.replace(pali, mask_codec=codec)
    found = with_codec.segment_batch([picture], "cat", max_new_tokens=26)[0]
    assert found.masks.shape == (len(found), picture.height, picture.width)
    assert set(found.labels) <= {"cat"} and found.scores is not None


def test_score_is_the_log_probability_of_the_answer(pali, picture):
    answer = pali.generate([picture], ["caption en"], max_new_tokens=4)[0]
    scored = pali.score(picture, "caption en", [answer.text, "cat", ""])
    assert [len(s.tokens) > 0 for s in scored] == [True] * 3
    if scored[0].tokens[:-1] == answer.tokens[:4]:  # it tokenizes as it was generated
        np.testing.assert_allclose(scored[0].logprobs[:4], answer.logprobs, atol=1e-4)
    batch = pali.score_batch([picture], ["caption en"], [["cat"]])
    np.testing.assert_allclose(batch[0][0].logprobs, scored[1].logprobs, atol=1e-4)


def test_classify_compares_labels(pali, picture):
    result = pali.classify(picture, ["cat", "dog"])
    assert result.best in ("cat", "dog") and sum(result.probabilities) == pytest.approx(1)
    with pytest.raises(pg.InvalidPromptError, match="twice"):
        pali.classify(picture, ["cat", "cat"])


@pytest.mark.parametrize("text, number", [("3", 3), ("two", 2), (" 0", 0)])
def test_count_reads_numbers(pali, picture, monkeypatch, text, number):
    answer_with(monkeypatch, text)
    assert pali.count(picture, "cats") == number


def test_count_says_when_it_is_no_number(pali, picture, monkeypatch):
    answer_with(monkeypatch, "several")
    with pytest.raises(pg.UnexpectedAnswerError, match="several"):
        pali.count(picture, "cats")


def test_prompt_takes_opencv_arrays(pali, picture):
    rgb = np.asarray(picture)
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    want = pali.generate([picture], ["ocr"])[0].text
    assert pali.prompt(bgr, "ocr") == [want]
    assert pali.prompt(rgb, "ocr", input_color_format="rgb") == [want]
    assert pali.prompt([bgr, bgr], "ocr") == [want, want]
    assert pali.prompt(np.stack([bgr, bgr]), "ocr", max_new_tokens=128) == [want, want]
    with pytest.raises(pg.InvalidImageError, match="rgba"):
        pali.prompt(rgb, "ocr", input_color_format="rgba")


def test_saved_and_loaded_again(pali, picture, tmp_path):
    pali.save(tmp_path / "saved")
    again = pg.from_pretrained(tmp_path / "saved", dtype="float32")
    assert again.config == pali.config
    stored = to_params(stack_layers(again.model))
    for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(to_params(pali.model)), strict=True):
        np.testing.assert_array_equal(a, b)
    again.save(tmp_path / "again")
    assert pg.from_pretrained(tmp_path / "again", dtype="float32").ocr(picture) == pali.ocr(picture)
    assert again.caption(picture) == pali.caption(picture)
    with pytest.raises(pg.CheckpointError):
        pali.save(tmp_path / "saved")
    processor = pg.load_processor(tmp_path / "saved")
    assert processor.image == pali.processor.image
    model = pg.load_model(tmp_path / "saved", dtype="float32")
    assert model.config == pali.config


def test_another_resolution(pali, picture, tmp_path):
    pali.save(tmp_path / "saved")
    size = pali.config.img.image_size * 2
    larger = pg.from_pretrained(tmp_path / "saved", dtype="float32", resolution=size)
    assert larger.config.img.image_size == larger.processor.image.size == size
    assert isinstance(larger.caption(picture), str)


def test_bad_requests(pali, picture):
    with pytest.raises(pg.InvalidPromptError, match="a list of 2"):
        pali.generate([picture, picture], ["ocr"])
    with pytest.raises(pg.InvalidPromptError):
        pali.generate([picture], "ocr")
    with pytest.raises(pg.InvalidPromptError, match="tokens"):
        pali.generate([picture], ["red " * 5000])
    with pytest.raises(pg.InvalidImageError):
        pali.caption("nowhere.png")
    with pytest.raises(pg.ConfigError, match="max_new_tokens"):
        pali.generate([picture], ["ocr"], max_new_tokens=0)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("paligemma2-3b-mix-448", "paligemma download google/paligemma2-3b-mix-448"),
        ("google/paligemma-3b-pt-224", "HF_HUB_OFFLINE"),
        ("paligema2-3b-mix-448", "paligemma2-3b-mix-448"),
        ("no/such/directory", "not a file"),
    ],
)
def test_names_without_files_say_what_to_do(name, hint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(pg.CheckpointError, match=hint):
        pg.from_pretrained(name)


@pytest.mark.parametrize("dtype", ["int7", jnp.int8, object()])
def test_unknown_dtype(dtype):
    with pytest.raises(pg.ConfigError, match="float32, bfloat16 or float16"):
        pg.from_pretrained("demo", dtype=dtype)


def test_dtype_may_be_an_object():
    assert jnp.dtype(pg.load_model("demo", dtype=jnp.float32).dtype) == jnp.float32


def test_one_prompt_that_is_no_list(pali):
    with pytest.raises(pg.InvalidPromptError, match=r"generate\(\[image\], \[prompt\]\)"):
        pali.generate(np.zeros((4, 4, 3), np.uint8), "caption en")


def test_repr_is_one_line(pali: pg.Pipeline):
    assert repr(pali).startswith("Pipeline(") and "\n" not in repr(pali)
