"""transformers loads what we write, and answers as we do: pytest -m parity"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.models.paligemma import flatten, nest
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.weights.huggingface import HuggingFace
from tests.fullsize.synthetic import make_tokenizer, smallest_vocabulary
from tests.tiny import GEMMA, GEMMA2, random_model, tiny_config

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


GOLDEN = Path(__file__).parents[1] / "golden"
PROMPTS = (
    "detect cat ; dog",
    "segment <loc0012><loc1023> the\t  red   car",
    "héllo 🦜 <seg003> \u2581x  \n  y",
    "a\n\nb",
    "   lead and trail  ",
    "<b>bold</b> <unused1> 12345 <mask>",
)


@pytest.fixture(params=["pg1", "pg2", "untied"])
def directory(request: Any, tmp_path: Path) -> Path:
    """A random model in several shards, written from memory."""
    changes: dict[str, Any] = {"tie_embeddings": False} if request.param == "untied" else {}
    tokenizer = pg.Tokenizer.from_file(GOLDEN / "processing" / "tiny_paligemma.model")
    llm = GEMMA if request.param == "pg1" else GEMMA2
    config = tiny_config(llm, vocab_size=tokenizer.vocab_size, **changes)
    processor = pg.Processor(tokenizer, ImagePreprocessing(config.img.image_size))
    target = tmp_path / request.param
    pali = pg.Pipeline(random_model(config), processor)
    pali.save(target, HuggingFace(shard_bytes=60_000), verify=True)
    assert len(list(target.glob("*.safetensors"))) > 1
    return target


def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (30, 20, 3), np.uint8))


def test_ids_pictures_and_logits(directory: Path):
    compare(directory, pg.load_model(directory, dtype="float32"))


@pytest.mark.parametrize("llm", [GEMMA, GEMMA2], ids=["pg1", "pg2"])
def test_merged_adapters(llm: pg.GemmaConfig, tmp_path: Path):
    """Trained with adapters in every layer, written as one model, with the logits of both."""
    tokenizer = pg.Tokenizer.from_file(GOLDEN / "processing" / "tiny_paligemma.model")
    base = random_model(tiny_config(llm, vocab_size=tokenizer.vocab_size))
    lora = pg.LoRA(rank=3, alpha=6, targets="(llm/layers|img)/.*")
    graphdef, params = pg.add_lora(base, lora, nnx.Rngs(0)).split()
    rng = np.random.default_rng(0)
    trained = {
        path: jnp.asarray(0.05 * rng.normal(size=leaf.shape), jnp.float32)
        if path.endswith("lora_b")
        else leaf
        for path, leaf in flatten(params).items()
    }
    model = graphdef.merge(nest(trained))
    processor = pg.Processor(tokenizer, ImagePreprocessing(base.config.img.image_size))
    target = tmp_path / "merged"
    pg.Pipeline(model, processor).save(target, HuggingFace(shard_bytes=60_000), verify=True)
    assert len(list(target.glob("*.safetensors"))) > 1
    batch = processor([picture()], [PROMPTS[0]])
    inputs = tuple(map(jnp.asarray, (batch.images, batch.tokens, batch.mask_ar)))
    assert np.abs(base(*inputs) - model(*inputs)).max() > 0.1  # or nothing was to be merged
    compare(target, model)


def compare(directory: Path, mine: pg.PaliGemma) -> None:
    """What transformers makes of the directory: ids, pictures, and the logits of `mine`."""
    theirs = transformers.AutoProcessor.from_pretrained(directory)
    ours = pg.load_processor(directory)
    model, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    size, rows = mine.config.img.num_patches, mine.config.llm.vocab_size
    for prompt in PROMPTS:
        given = theirs(images=picture(), text="<image>" + prompt, return_tensors="pt")
        batch = ours([picture()], [prompt])
        count = int(np.asarray(batch.mask_input).sum())
        ids = given["input_ids"][0].tolist()
        assert ids == [rows] * size + np.asarray(batch.tokens)[0, :count].tolist()
        pixels = np.moveaxis(given["pixel_values"][0].numpy(), 0, -1)
        np.testing.assert_allclose(pixels, np.asarray(batch.images)[0, 0], atol=1e-6)
        given.pop("labels")
        with torch.no_grad():
            want = model(**given).logits[0, size:].numpy()
        logits = mine(*map(jnp.asarray, (batch.images, batch.tokens, batch.mask_ar)))[0, :count]
        np.testing.assert_allclose(np.asarray(logits), want[:, :rows], atol=1e-4, rtol=1e-5)
        assert want.argmax(axis=-1).max() < rows  # never a filler row


def test_a_tokenizer_without_a_mask_piece(tmp_path: Path):
    rows = smallest_vocabulary()
    config = tiny_config(GEMMA, vocab_size=rows)
    processor = pg.Processor(pg.Tokenizer.from_bytes(make_tokenizer(rows)), ImagePreprocessing(8))
    pg.Pipeline(random_model(config), processor).save(tmp_path / "hf", "huggingface")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(tokenizer) == rows + 1
    assert tokenizer.convert_tokens_to_ids("<image>") == rows
    assert tokenizer.encode("<mask>", add_special_tokens=False) == pg.Tokenizer.from_bytes(
        make_tokenizer(rows)
    ).encode("<mask>")


@pytest.mark.parametrize("resolution", [8, 16])
def test_generation_from_big_visions_file(resolution: int, tmp_path: Path):
    """npz -> Hugging Face -> transformers, with position embeddings resampled on the way."""
    tokenizer = pg.Tokenizer.from_file(GOLDEN / "processing" / "tiny_paligemma.model")
    config = tiny_config(dataclasses.replace(GEMMA2, final_logit_softcap=0.0))
    llm = dataclasses.replace(config.llm, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, llm=llm)
    processor = pg.Processor(tokenizer, ImagePreprocessing(8))
    pg.Pipeline(random_model(config), processor).save(tmp_path / "bv", "big_vision")
    target = tmp_path / "hf"
    pg.convert(tmp_path / "bv", target, format="huggingface", resolution=resolution, verify=True)
    theirs = transformers.AutoProcessor.from_pretrained(target)
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        target, dtype=torch.float32, attn_implementation="eager"
    )
    given = theirs(images=picture(), text="<image>caption en", return_tensors="pt")
    given.pop("labels")
    length = given["input_ids"].shape[1]
    want = model.generate(**given, max_new_tokens=8, do_sample=False)[0, length:].tolist()
    pali = pg.from_pretrained(target, dtype="float32")
    (answer,) = pali.generate([picture()], ["caption en"], max_new_tokens=8)
    assert list(answer.tokens) == want[: len(answer.tokens)]
