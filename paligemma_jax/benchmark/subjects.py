"""What is measured: a subject is one implementation of a model; all get the same inputs.

Letters: B batch, H W pixels, T prompt tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from paligemma_jax.benchmark import BASELINES, Implementation, Precision
from paligemma_jax.benchmark.measure import Sample
from paligemma_jax.config import GEMMA_2B, VARIANTS, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.errors import ConfigError

# Four layers of PaliGemma 3B on each side and a small vocabulary: 0.6 billion parameters, which fit
# a laptop and are as bound by memory and matmuls as the full model is.
PROXY_4 = PaliGemmaConfig(
    img=SigLIPConfig(depth=4), llm=dataclasses.replace(GEMMA_2B, depth=4, vocab_size=32_768)
)
# Half of that: 8 GB of memory are enough to train all of it.
PROXY_2 = PaliGemmaConfig(
    img=dataclasses.replace(PROXY_4.img, depth=2), llm=dataclasses.replace(PROXY_4.llm, depth=2)
)
# To try the benchmark itself.
TINY = PaliGemmaConfig(
    img=SigLIPConfig(image_size=56, width=64, depth=2, mlp_dim=128, num_heads=4),
    llm=dataclasses.replace(
        GEMMA_2B, width=64, depth=2, mlp_dim=128, num_heads=4, head_dim=16, query_scale=16**-0.5,
        vocab_size=512,
    ),
)  # fmt: skip
PROXY = "4-layer-proxy"
MODELS: dict[str, PaliGemmaConfig] = {
    "tiny": TINY, "2-layer-proxy": PROXY_2, PROXY: PROXY_4, **VARIANTS
}  # fmt: skip


def find_model(name: str) -> PaliGemmaConfig:
    """The architecture of a model; raises ConfigError for an unknown name."""
    if name not in MODELS:
        raise ConfigError(
            f"expected tiny, 2-layer-proxy, 4-layer-proxy or a published model, got {name!r}. "
            "List the published ones with: paligemma models"
        )
    return MODELS[name]


Prompts = tuple[np.ndarray, np.ndarray]  # images f32[B, H, W, 3] in [-1, 1], tokens i32[B, T]


class Subject(Protocol):
    """One implementation of one checkpoint, loaded for inference.

    Every method that is timed prepares its inputs (on the device, if there is one) and returns a
    call, which does the work once and waits for its end. A call can be repeated.

    Prompts have no padding and no image tokens; an implementation that wants image tokens in its
    prompt puts them first.
    """

    def encode_images(self, images: np.ndarray) -> Callable[[], object]:
        """The image encoder and its projection. `images` f32[B, H, W, 3] in [-1, 1]."""
        ...

    def first_token(self, prompts: Prompts) -> Callable[[], np.ndarray]:
        """Image encoder, prefill and argmax; the call gives i32[B]."""
        ...

    def generate(self, prompts: Prompts, new_tokens: int) -> Callable[[], np.ndarray]:
        """Greedy generation that no token ends; the call gives i32[B, new_tokens]."""
        ...

    def decode(self, prompts: Prompts, new_tokens: int) -> Callable[[], Sample]:
        """The same, timed from the first token to the last; everything is compiled beforehand."""
        ...

    def logits(self, prompts: Prompts) -> np.ndarray:
        """f32[B, V] after the prompt; V is the model's own vocabulary, without padding."""
        ...

    def peak_bytes(self) -> int:
        """Peak memory of this process: of the device, on CPUs resident memory."""
        ...


class Trainer(Protocol):
    """One implementation that trains one checkpoint on one batch.

    Master weights and moments are float32. The optimizer is AdamW without weight decay, at a
    constant learning rate, of gradients clipped to a norm of 1.
    """

    def step(self) -> float:
        """One update, to the end of its work; returns the loss before it."""
        ...

    def reset_peak(self) -> None:
        """Measures `peak_bytes` from now on, where that is possible."""
        ...

    def peak_bytes(self) -> int:
        """As of a `Subject`."""
        ...

    def numbers(self) -> dict[str, float]:
        """What the implementation knows about its steps."""
        ...


PROMPT = 32  # tokens


def random_images(config: PaliGemmaConfig, batch: int) -> np.ndarray:
    """f32[B, H, W, 3] in [-1, 1]."""
    size = config.img.image_size
    pixels = np.random.default_rng(batch).uniform(-1, 1, (batch, size, size, 3))
    return pixels.astype(np.float32)


def random_prompts(config: PaliGemmaConfig, batch: int, length: int = PROMPT) -> Prompts:
    """Images, and tokens i32[B, length] that begin with the begin-of-sequence token."""
    last = min(config.llm.vocab_size, 250_000)  # above are <loc> and <seg>
    tokens = np.random.default_rng(batch + length).integers(3, last, (batch, length))
    tokens[:, 0] = 2
    return random_images(config, batch), tokens.astype(np.int32)


def open_subject(
    implementation: Implementation, weights: Path | None, model: str, dtype: Precision
) -> Subject:
    """Loads a Hugging Face directory; without one this library makes random weights on the device.

    Raises:
      MissingExtraError: if the baseline is not installed.
      ConfigError: if the implementation cannot run this model in this way.
    """
    if implementation in BASELINES and dtype.quantized:
        raise ConfigError(
            f"expected float32 or bfloat16 for {implementation}, got {dtype}. "
            f"Run: paligemma bench --dtype {dtype} --implementation {Implementation.OURS}"
        )
    if implementation is Implementation.OURS:
        from paligemma_jax.benchmark.ours import Ours, load_ours, random_model

        if weights is None:
            return Ours(random_model(find_model(model), dtype))
        return load_ours(weights, dtype)
    if weights is None:
        raise ConfigError(
            f"{implementation} needs a checkpoint, and {model} is measured without one here. "
            f"Run: paligemma bench --implementation {Implementation.OURS}"
        )
    if implementation is Implementation.BIG_VISION_STYLE:
        from paligemma_jax.benchmark.ours import load_big_vision_style

        return load_big_vision_style(weights, dtype)
    from paligemma_jax.benchmark.huggingface import load_huggingface

    compiled = implementation is Implementation.HUGGING_FACE_COMPILED
    return load_huggingface(weights, dtype.value, compiled=compiled)
