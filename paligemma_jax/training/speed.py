"""How fast a run is, and what share of the devices' arithmetic that takes."""

import dataclasses
import time
from collections.abc import Mapping

import jax

from paligemma_jax.config import PaliGemmaConfig

# Dense products of bfloat16 (float16 on a T4), operations/s of one device, from the makers' tables.
_PEAKS: Mapping[str, float] = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "T4": 65e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61e12,
}


def device_peak() -> float | None:
    """Operations/s of one device at best; None where it is not known, as on CPUs."""
    kind = jax.devices()[0].device_kind.lower()
    return next((peak for name, peak in _PEAKS.items() if name.lower() in kind), None)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one example costs.

    Attributes:
      tokens: of picture and text, as the decoder sees them.
      operations: of its forward and backward pass; what is computed twice to save memory counts
        once, as MFU is defined (arXiv 2204.02311, appendix B).
    """

    tokens: int
    operations: float


def work_of(
    config: PaliGemmaConfig,
    text_length: int,
    *,
    images: int = 1,
    image_trained: bool = True,
    text_trained: bool = True,
) -> Work:
    """The work on one example; frozen weights need no gradients of their own.

    `image_trained` and `text_trained` say whether the weights of the encoder and of the decoder
    (most of them) are trained. Where nothing of the encoder is, it is not gone back through.
    """
    img, llm = config.img, config.llm
    patches = img.num_patches
    attention = 4 * img.width * img.width + 2 * img.width * img.mlp_dim
    encoder = 2 * patches * img.depth * attention + 4 * patches**2 * img.width * img.depth
    encoder += 2 * patches * (3 * img.patch_size**2 * img.width + img.width * llm.width)
    tokens = images * patches + text_length
    layer = llm.width * llm.head_dim * (2 * llm.num_heads + 2 * llm.num_kv_heads)
    layer += 3 * llm.width * llm.mlp_dim
    decoder = 2 * tokens * llm.depth * layer
    decoder += 4 * tokens**2 * llm.num_heads * llm.head_dim * llm.depth
    decoder += 2 * text_length * llm.width * llm.vocab_size
    # Forward once; backward as much again for what lies before, and again for weights.
    passes = 1 + (2 if image_trained else 0)
    operations = images * encoder * passes + decoder * (3 if text_trained else 2)
    return Work(tokens, float(operations))


class Pace:
    """Rates over the steps since it was last asked; pauses can be left out."""

    def __init__(self, work: Work, batch_size: int):
        self._work, self._batch_size = work, batch_size
        peak = device_peak()
        self._peak = None if peak is None else peak * jax.device_count()
        self._start, self._steps = time.perf_counter(), 0

    def step(self) -> None:
        """One more step was made."""
        self._steps += 1

    def restart(self) -> None:
        """Forgets what was; to be called after a pause."""
        self._start, self._steps = time.perf_counter(), 0

    def rates(self) -> dict[str, float]:
        """samples/s, tokens/s, seconds a step and, where the device is known, MFU (0 to 1)."""
        elapsed, steps = time.perf_counter() - self._start, self._steps
        self.restart()
        if not steps or elapsed <= 0:
            return {}
        samples = steps * self._batch_size / elapsed
        found = {
            "samples_per_second": samples,
            "tokens_per_second": samples * self._work.tokens,
            "seconds_per_step": elapsed / steps,
        }
        if self._peak:
            found["mfu"] = samples * self._work.operations / self._peak
        return found
