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
from paligemma_jax.models.paligemma import PaliGemma, from_params
from paligemma_jax.weights.load import load_params

GOLDEN = Path(__file__).parent / "golden"
BIG_VISION = ("pg1", "pg2", "pg2_softcap", "pg2_28b", "pg1_multi")
HUGGING_FACE = ("pg1", "pg2", "pg2_28b", "pg2_sw")
EOS = 1


def assert_close(actual: Any, expected: Any, atol: float = 1e-4, rtol: float = 1e-5) -> None:
    """The project's numeric contract: 1e-4 absolute plus 1e-5 relative, in float32."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=atol, rtol=rtol)


# big_vision's small models turn a rounding error of 1e-5 in the image encoder into one of 1e-4 and
# more in the logits. From pictures to logits the contract can be tested only with the instructions
# that the references were made with: jax 0.10's, all optimisations on. Later XLA rounds otherwise.
SAME_ROUNDING = jax.__version__.startswith("0.10.")


def assert_close_end_to_end(actual: Any, expected: Any) -> None:
    """`assert_close` for what `optimized` programs make of pictures; 1e-3 where XLA differs."""
    assert_close(actual, expected, atol=1e-4 if SAME_ROUNDING else 1e-3)


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

    def model(self, **changes: Any) -> PaliGemma:
        """The model in float32; `changes` are fields of the decoder's configuration."""
        llm = dataclasses.replace(self.config.llm, **changes)
        return from_params(dataclasses.replace(self.config, llm=llm), self.params, jnp.float32)


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
