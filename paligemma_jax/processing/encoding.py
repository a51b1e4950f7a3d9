"""Prompt and answer -> token ids and masks, in the two ways PaliGemma's implementations do it.

Both give `bos prompt newline answer eos`. They differ where the end of the prompt merges with the
newline (a prompt that ends in a newline or spaces): big_vision tokenizes the newline on its own,
Hugging Face together with the prompt.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.overflow import Overflow
from paligemma_jax.processing.tokenizer import Tokenizer

SEPARATOR = "\n"
Arrays = dict[str, np.ndarray]


@runtime_checkable
class Encoding(Protocol):
    """How a prompt becomes ids."""

    name: ClassVar[str]

    def prompt_ids(self, tokenizer: Tokenizer, prefix: str) -> list[int]:
        """bos, the prefix and the separating newline."""
        ...


@dataclasses.dataclass(frozen=True)
class ThreePieceEncoding:
    """big_vision's: prefix, newline and suffix are tokenized separately."""

    name: ClassVar[str] = "big_vision"

    def prompt_ids(self, tokenizer: Tokenizer, prefix: str) -> list[int]:
        return [tokenizer.bos_id, *tokenizer.encode(prefix), *tokenizer.encode(SEPARATOR)]


@dataclasses.dataclass(frozen=True)
class OnePieceEncoding:
    """Hugging Face's PaliGemmaProcessor: prefix and newline are tokenized as one string."""

    name: ClassVar[str] = "huggingface"

    def prompt_ids(self, tokenizer: Tokenizer, prefix: str) -> list[int]:
        return [tokenizer.bos_id, *tokenizer.encode(prefix + SEPARATOR)]


ENCODINGS: dict[str, Encoding] = {e.name: e for e in (ThreePieceEncoding(), OnePieceEncoding())}


def encoding_from_name(name: str) -> Encoding:
    """The encoding a saved processor names; ConfigError if there is no such one."""
    try:
        return ENCODINGS[name]
    except KeyError as e:
        raise ConfigError(
            f"The text encoding {name!r} is unknown. {' and '.join(ENCODINGS)} fit. "
            "Convert the checkpoint again: paligemma convert SOURCE TARGET"
        ) from e


def train_arrays(
    prompt: Sequence[int], answer: Sequence[int], length: int, on_overflow: Overflow
) -> Arrays:
    """big_vision's `combine_and_keep_train`: `text`, `mask_ar`, `mask_loss`, each i32[length + 1].

    One longer than `length`, because a trainer takes all but the last position as inputs and all
    but the first as targets. `prompt` begins with bos, `answer` ends with eos. Padding is 0, 1, 0.
    """
    tokens = on_overflow.fit([*prompt, *answer], length + 1)
    position = np.arange(length + 1)
    answered = position >= len(prompt)
    return {
        "text": _pad(tokens, length + 1),
        "mask_ar": answered.astype(np.int32),
        "mask_loss": (answered & (position < len(tokens))).astype(np.int32),
    }


def prompt_arrays(
    prompt: Sequence[int], continuation: Sequence[int], length: int, on_overflow: Overflow
) -> Arrays:
    """big_vision's `combine_and_keep_eval`: `text`, `mask_ar`, `mask_input`, each i32[length].

    `prompt` begins with bos; `continuation` is a beginning of the answer to go on from, often
    empty. Padding is 0, 1, 0.
    """
    tokens = on_overflow.fit([*prompt, *continuation], length)
    position = np.arange(length)
    return {
        "text": _pad(tokens, length),
        "mask_ar": (position >= len(prompt)).astype(np.int32),
        "mask_input": (position < len(tokens)).astype(np.int32),
    }


def _pad(tokens: list[int], length: int) -> np.ndarray:
    text = np.full(length, Tokenizer.pad_id, np.int32)
    text[: len(tokens)] = tokens
    return text
