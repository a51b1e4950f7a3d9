"""Live parity: transformers and this library on the same files and fresh random inputs.

Needs torch and transformers, which nothing else here needs: pytest -m parity
"""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.generate import generate
from paligemma_jax.loading import load_model
from paligemma_jax.processing.processor import Batch

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


GOLDEN = Path(__file__).parents[1] / "golden" / "huggingface"
VARIANTS = ["pg1", "pg2", "pg2_28b"]
ROWS, PREFIX, SUFFIX = 3, 6, 5


@pytest.fixture(params=VARIANTS)
def directory(request, tmp_path):
    """A copy, since transformers may write beside the weights."""
    source, target = GOLDEN / request.param / "hub_old", tmp_path / request.param
    shutil.copytree(source, target)
    return target


def reference(directory):
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def inputs(directory, length, seed=0):
    config = json.loads((directory / "config.json").read_text())
    size = config["vision_config"].get("image_size", 224)
    patches = (size // config["vision_config"]["patch_size"]) ** 2
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (ROWS, size, size, 3)).astype(np.float32)
    tokens = rng.integers(4, config["_vocab_size"], (ROWS, length)).astype(np.int32)
    tokens[:, 0] = 2
    image_ids = np.full((ROWS, patches), config["image_token_index"])
    ids = torch.tensor(np.concatenate([image_ids, tokens], axis=1), dtype=torch.long)
    pixels = torch.tensor(np.moveaxis(images, -1, 1))
    return images, tokens, ids, pixels, config["_vocab_size"]


def test_logits(directory):
    images, tokens, ids, pixels, rows = inputs(directory, PREFIX + SUFFIX)
    types = torch.zeros_like(ids)
    types[:, -SUFFIX:] = 1
    with torch.no_grad():
        expected = reference(directory)(
            input_ids=ids,
            pixel_values=pixels,
            token_type_ids=types,
            attention_mask=torch.ones_like(ids),
        ).logits
    mask_ar = np.zeros_like(tokens)
    mask_ar[:, PREFIX:] = 1
    model = load_model(directory, dtype="float32")
    logits = model(*map(jnp.asarray, (images, tokens, mask_ar)))
    want = expected[:, -tokens.shape[1] :, :rows].numpy()
    np.testing.assert_allclose(np.asarray(logits), want, atol=1e-4, rtol=1e-5)


def test_greedy_tokens(directory):
    images, tokens, ids, pixels, rows = inputs(directory, PREFIX, seed=1)
    with torch.no_grad():
        out = reference(directory).generate(
            input_ids=ids,
            pixel_values=pixels,
            token_type_ids=torch.zeros_like(ids),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            # The filler rows behind the vocabulary are no tokens: we drop them when loading.
            suppress_tokens=list(range(rows, 320)),
        )
    batch = Batch(
        images=images[:, None],
        tokens=tokens,
        mask_ar=np.zeros_like(tokens),
        mask_input=jnp.ones(tokens.shape, bool),
    )
    ours = generate(load_model(directory, dtype="float32"), batch, max_new_tokens=8)
    for row, expected in zip(ours, out[:, ids.shape[1] :].tolist(), strict=True):
        assert list(row.tokens) == expected[: len(row.tokens)]
