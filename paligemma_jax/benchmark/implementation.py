"""What can be measured: one way to run one checkpoint, ours or a peer's.

Letters: B rows, H W pixels, T prompt tokens, V vocabulary.
"""

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from paligemma_jax.benchmark.floors import Sizes
from paligemma_jax.benchmark.timing import Sample
from paligemma_jax.errors import ConfigError


class Kind(enum.StrEnum):
    """The implementations."""

    OURS = "ours"
    SCANNED = "scanned"  # see `scanned`
    HUGGING_FACE = "huggingface"  # `transformers` as it comes: eager, growing cache
    HUGGING_FACE_COMPILED = "huggingface-compiled"  # static cache and torch.compile


PEERS = (Kind.HUGGING_FACE, Kind.HUGGING_FACE_COMPILED)


class Precision(enum.StrEnum):
    """What weights are stored in; integers are for the decoder's, by the recipe of that name."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT8_DYNAMIC = "int8-dynamic"
    INT4 = "int4"

    @property
    def quantized(self) -> bool:
        """Whether it is of integers, which peers are not measured with."""
        return self not in (Precision.FLOAT32, Precision.BFLOAT16)

    @property
    def floats(self) -> "Precision":
        """What is no integer: activations, cache, image encoder."""
        return Precision.BFLOAT16 if self.quantized else self

    @property
    def sizes(self) -> Sizes:
        """Bytes of a number; those of the integers' scales are left out."""
        match self:
            case Precision.FLOAT32:
                return Sizes.of(4.0)
            case Precision.BFLOAT16:
                return Sizes.of(2.0)
            case Precision.INT4:
                return Sizes(matrix=0.5, table=1.0, other=2.0)
        return Sizes(matrix=1.0, table=1.0, other=2.0)


class Implementation(Protocol):
    """One way to run one checkpoint.

    Every method that is timed prepares its inputs (on the device, where there is one) and returns a
    call; calling it does the work once and waits for its end. A call can be repeated.

    Prompts have no padding and no image tokens: an implementation that wants image tokens in its
    prompt puts them before it.
    """

    def encode_images(self, images: np.ndarray) -> Callable[[], None]:
        """The image encoder and its projection. `images` f32[B, H, W, 3] in [-1, 1]."""
        ...

    def first_token(self, images: np.ndarray, tokens: np.ndarray) -> Callable[[], np.ndarray]:
        """Image encoder, prefill and argmax; the call gives i32[B]. `tokens` i32[B, T]."""
        ...

    def answer(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> Callable[[], np.ndarray]:
        """Greedy answers from pictures to tokens, never ended early; gives i32[B, new_tokens]."""
        ...

    def decoding(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> Callable[[], Sample]:
        """Such answers; a call says how long it took from the first token to the last.

        What compiles has been compiled before the first call.
        """
        ...

    def logits(self, images: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """f32[B, V] after the prompt; V is the model's own, without rows of padding."""
        ...

    def peak_bytes(self) -> int:
        """Most memory this process held so far: device memory, on CPUs resident memory."""
        ...


def open_implementation(kind: Kind, weights: Path, dtype: Precision) -> Implementation:
    """Loads the Hugging Face directory `weights` in `dtype`.

    Raises:
      MissingExtraError: where the peer is not installed.
      ConfigError: where the peer cannot run this model in this way.
    """
    if kind in PEERS and dtype.quantized:
        raise ConfigError(
            f"{kind} is measured with weights as they are, not in {dtype}. float32 and bfloat16 "
            f"fit. Leave it out: paligemma bench --dtype {dtype} --implementation ours"
        )
    match kind:
        case Kind.OURS:
            from paligemma_jax.benchmark.ours import open_ours

            return open_ours(weights, dtype)
        case Kind.SCANNED:
            from paligemma_jax.benchmark.scanned import open_scanned

            return open_scanned(weights, dtype)
        case Kind.HUGGING_FACE | Kind.HUGGING_FACE_COMPILED:
            from paligemma_jax.benchmark.huggingface import open_huggingface

            compiled = kind is Kind.HUGGING_FACE_COMPILED
            return open_huggingface(weights, dtype.value, compiled=compiled)
