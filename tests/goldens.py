"""The reference vectors of tests/golden: big_vision's and Hugging Face's outputs on small models.

big_vision: google-research/big_vision, commit 0127fb6, float32, matmul precision "highest".
Hugging Face: transformers 5.23.0, eager attention, float32.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.paligemma import PaliGemma, flatten, from_params
from paligemma_jax.weights.big_vision import big_vision_name
from paligemma_jax.weights.load import load_params
from tests.reference import Reference

GOLDEN = Path(__file__).parent / "golden"
BIG_VISION = ("pg1", "pg2", "pg2_softcap", "pg2_28b", "pg1_multi")
HUGGING_FACE = ("pg1", "pg2", "pg2_28b", "pg2_sw")
EOS = 1


def assert_close(actual: Any, expected: Any, atol: float = 1e-4, rtol: float = 1e-5) -> None:
    """The project's numeric contract: 1e-4 absolute plus 1e-5 relative, in float32."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=atol, rtol=rtol)


def assert_as_exact(actual: Any, golden: Any, exact: Any, atol: float = 1e-4) -> None:
    """`actual` is off a float64 computation by at most twice what the golden vector is, or 1e-4.

    The models of the golden vectors are badly conditioned: how far float32 strays depends on the
    processor's instructions, for the original implementation as for this one.
    """
    actual, golden, exact = (np.asarray(a, np.float64) for a in (actual, golden, exact))
    allowed = max(2 * np.abs(golden - exact).max(), atol)
    np.testing.assert_allclose(actual, exact, atol=allowed, rtol=1e-5)


@contextlib.contextmanager
def optimized() -> Iterator[None]:
    """Compiles as users do; the other tests do without most optimisations, see conftest.py."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def until_eos(tokens: np.ndarray) -> np.ndarray:
    """bool[B, M]: the tokens up to and including each row's first EOS."""
    return np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) == 0


@dataclasses.dataclass(frozen=True)
class Golden:
    """One case: the model's weights, and inputs and outputs by name."""

    config: PaliGemmaConfig
    params: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def reference(self, **changes: Any) -> Reference:
        """The model in float64; `changes` as for `model`."""
        llm = dataclasses.replace(self.config.llm, **changes)
        flat = flatten(self.params)
        weights = {big_vision_name(path): np.asarray(weight) for path, weight in flat.items()}
        return Reference(weights, dataclasses.replace(self.config, llm=llm))

    @functools.cached_property
    def exact(self) -> "Exact":
        """The same in float64; big_vision's cases only."""
        return Exact(self)

    @functools.cached_property
    def atol(self) -> float:
        """How far two float32 computations from images to logits may be apart."""
        error = np.abs(self["train_logits"] - self.exact.train_logits).max()
        return float(max(3 * error, 1e-4))

    def model(self, **changes: Any) -> PaliGemma:
        """The model in float32; `changes` are fields of the decoder's configuration."""
        llm = dataclasses.replace(self.config.llm, **changes)
        return from_params(dataclasses.replace(self.config, llm=llm), self.params, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Exact:
    """What big_vision's cases come to in float64, see `tests.reference`."""

    golden: Golden

    @functools.cached_property
    def reference(self) -> Reference:
        return self.golden.reference(final_logit_softcap=0.0)

    @functools.cached_property
    def image_encoder_out(self) -> np.ndarray:
        images = self.golden["image"]
        return np.stack([self.reference.encode(i) for i in images.reshape(-1, *images.shape[-3:])])

    @functools.cached_property
    def image_embeddings(self) -> np.ndarray:
        w = self.reference.weights
        tokens = self.image_encoder_out @ w["img/head/kernel"].astype(float) + w["img/head/bias"]
        return tokens.reshape(self.golden["image_embeddings"].shape)

    @functools.cached_property
    def train_logits(self) -> np.ndarray:
        return self.forced(self.image_embeddings)

    @functools.cached_property
    def prefill_last_logits(self) -> np.ndarray:
        return self.after_prompt(self.image_embeddings)[:, 0]

    def forced(self, image_tokens: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] of the training text, teacher forced."""
        golden = self.golden
        texts = [_split(*row) for row in zip(golden["text"], golden["mask_ar"], strict=True)]
        rows = zip(image_tokens, texts, strict=True)
        return np.stack([self.reference.logits(x, text[0], text[1][:-1]) for x, text in rows])

    def after_prompt(self, image_tokens: np.ndarray, softcap: float = 0.0) -> np.ndarray:
        """Logits [B, 1 + steps, V] after the prompt and after each greedy token but the last."""
        golden, reference = self.golden, self.reference
        llm = dataclasses.replace(reference.config.llm, final_logit_softcap=softcap)
        capped = dataclasses.replace(
            reference, config=dataclasses.replace(reference.config, llm=llm)
        )
        found = []
        for row, image in enumerate(image_tokens):
            prompt = golden["prompt_text"][row][golden["prompt_mask_input"][row].astype(bool)]
            answer = golden["greedy_tokens"][row, :-1]
            found.append(capped.logits(image, prompt, answer)[len(prompt) - 1 :])
        return np.stack(found)

    def loss(self, label_smoothing: float = 0.0) -> np.ndarray:
        """Of each example, in nats."""
        return np.array(
            _losses(self.reference, self.golden, self.image_embeddings, label_smoothing)
        )

    @functools.cached_property
    def gradient_norms(self) -> dict[str, float]:
        """Of the batch's mean loss, by big_vision's name of the weight."""
        golden = self.golden

        def loss(weights: dict[str, jax.Array]) -> jax.Array:
            reference = dataclasses.replace(self.reference, weights=weights, xp=jnp)
            images = golden["image"]
            images = images if images.ndim == 5 else images[:, None]
            tokens = [jnp.concatenate([reference.embed_image(i) for i in row]) for row in images]
            return jnp.mean(jnp.stack(_losses(reference, golden, tokens)))

        with jax.enable_x64(True):
            weights = {
                name: jnp.asarray(w, jnp.float64) for name, w in self.reference.weights.items()
            }
            gradients = jax.jit(jax.grad(loss))(weights)
            return {name: float(jnp.linalg.norm(g.ravel())) for name, g in gradients.items()}


def _split(text: np.ndarray, mask_ar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and answer."""
    start = int(np.argmax(mask_ar > 0)) if mask_ar.any() else len(text)
    return text[:start], text[start:]


def _losses(
    reference: Reference, golden: Golden, image_tokens: Any, label_smoothing: float = 0.0
) -> list[Any]:
    rows = zip(image_tokens, golden["text"], golden["mask_ar"], golden["mask_loss"], strict=True)
    return [
        reference.loss(image, *_split(text, mask_ar), mask_loss, label_smoothing)
        for image, text, mask_ar, mask_loss in rows
    ]


def assert_gradient_norms(name: str, norms: dict[str, float]) -> None:
    """Norms by big_vision's weight names are as exact as big_vision's own, relative to each.

    Softmax is blind to a constant added to all keys, so that gradient is zero but for rounding.
    """
    golden, exact = big_vision(name), big_vision(name).exact.gradient_norms
    blind = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/bias"
    prefix = "grad_norm/"
    theirs = {k.removeprefix(prefix): v for k, v in golden.arrays.items() if k.startswith(prefix)}
    assert set(norms) == set(theirs) == set(exact)
    assert norms[blind] < 1e-4
    names = sorted(set(norms) - {blind})
    ratio = [np.array([values[n] / exact[n] for n in names]) for values in (norms, theirs)]
    assert_as_exact(ratio[0], ratio[1], np.ones(len(names)))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@functools.cache
def big_vision(name: str) -> Golden:
    """A case of tests/golden/big_vision; see `BIG_VISION`."""
    arrays = _arrays(GOLDEN / "big_vision" / f"{name}.golden.npz")
    config, params = load_params(GOLDEN / "big_vision" / f"{name}.params.npz")
    meta = json.loads(arrays.pop("meta").tobytes())["llm"]
    if meta.get("query_pre_attn_norm") == "rsqrt_emb_per_head":  # 28B's rule, at another width
        scale = (meta["width"] / meta["num_heads"]) ** -0.5
        config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, query_scale=scale))
    return Golden(config, params, arrays)


def prompt(golden: Golden) -> tuple[jax.Array, ...]:
    """What big_vision's inference got: images [B, N, ...], tokens, mask_ar, mask_input."""
    image = golden["image"]
    images = image if image.ndim == 5 else image[:, None]
    names = ("prompt_text", "prompt_mask_ar", "prompt_mask_input")
    return jnp.asarray(images), *(jnp.asarray(golden[name]) for name in names)


@functools.cache
def hugging_face(name: str) -> Golden:
    """A case of tests/golden/huggingface; see `HUGGING_FACE`.

    The configuration comes from config.json, the sliding window apart (None).
    """
    path = GOLDEN / "huggingface" / name
    config, params = load_params(path / "hub_old")
    return Golden(config, params, _arrays(path / "golden.npz"))


def hugging_face_images(golden: Golden) -> np.ndarray:
    """pixel_values as [B, height, width, 3]."""
    return np.moveaxis(golden["pixel_values"], 1, -1)


def hugging_face_rows(
    golden: Golden, ids: np.ndarray, attention_mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left-padded rows of image and text ids as tokens, mask_ar, mask_input, padded right."""
    image_tokens = golden.config.img.num_patches
    rows = [row[mask == 1][image_tokens:] for row, mask in zip(ids, attention_mask, strict=True)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask_input = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask_input[i, : len(row)] = True
    return tokens, (~mask_input).astype(np.int32), mask_input
