"""Images and text -> Batch, encoded as the checkpoint was trained.

A prompt becomes `bos prompt newline`, and an answer follows as `answer eos`. The two encodings
differ where the end of the prompt merges with the newline (a prompt that ends in a newline or
spaces): big_vision tokenizes the newline on its own, Hugging Face together with the prompt.

Letters: B sequences, N images a sequence, H W pixels, T text tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from paligemma_jax.errors import ConfigError, InvalidImageError, InvalidPromptError
from paligemma_jax.processing.image import ImagePreprocessing, ImageSource
from paligemma_jax.processing.tokenizer import Tokenizer

Encoding = Literal["big_vision", "huggingface"]
ENCODINGS: tuple[Encoding, ...] = ("big_vision", "huggingface")
# What happens to text of too many tokens: InvalidPromptError, or it is cut from the right as
# big_vision does (long answers lose eos, long prompts the newline).
Overflow = Literal["error", "truncate"]
MIN_TEXT_LENGTH = 16
Array = jax.Array | np.ndarray
Arrays = dict[str, np.ndarray]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences, right-padded to one text length and filled up to one batch size.

    Attributes:
      images: f32[B, N, H, W, 3] in [-1, 1]; None where there are no images.
      tokens: i32[B, T], starting with bos; 0 is padding.
      mask_ar: i32[B, T], 0 where a token and those before it see each other (prompt), 1 where it is
        seen only by later ones (answer and padding).
      mask_input: bool[B, T], False on padding.
      mask_loss: i32[B, T], 1 on the tokens to learn; None outside training.
      row_mask: bool[B], False on sequences that only fill the batch; None if all are real.
    """

    images: Array | None
    tokens: Array
    mask_ar: Array
    mask_input: Array
    mask_loss: Array | None = None
    row_mask: Array | None = None


def bucket(size: int, minimum: int = 1) -> int:
    """The smallest of minimum, 2 minimum, 4 minimum, ... that holds `size`.

    Few shapes for many requests: every new shape costs a compilation.
    """
    while minimum < size:
        minimum *= 2
    return minimum


def images_of(entry: Any) -> list[Any]:
    """The images of one prompt: none for None, several for a list, tuple or 4-D array."""
    if entry is None:
        return []
    if isinstance(entry, list | tuple) or (isinstance(entry, np.ndarray) and entry.ndim == 4):
        return list(entry)
    return [entry]


def group_by_image_count(images: Sequence[Any]) -> dict[int, list[int]]:
    """Number of images -> the indices in `images` (one entry a prompt) that have that many.

    A batch holds prompts with equally many images; these are the batches to make.
    """
    groups: dict[int, list[int]] = {}
    for index, entry in enumerate(images):
        groups.setdefault(len(images_of(entry)), []).append(index)
    return groups


Entry = ImageSource | Sequence[ImageSource] | None


@dataclasses.dataclass(frozen=True)
class Processor:
    """Tokenizer, image preprocessing and text encoding of one checkpoint.

    `max_text_length` bounds the tokens of a prompt, bos and newline included, image tokens not; the
    default is the longest text that published checkpoints were trained with.
    """

    tokenizer: Tokenizer
    image: ImagePreprocessing
    encoding: Encoding = "big_vision"
    max_text_length: int = 512

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ConfigError(
                f"Expected a text encoding of {' or '.join(ENCODINGS)}, got {self.encoding!r}."
            )

    def __call__(
        self,
        images: Sequence[Entry] | None,
        prompts: Sequence[str],
        *,
        answers: Sequence[str] | None = None,
        min_length: int = MIN_TEXT_LENGTH,
        allow_urls: bool = False,
    ) -> Batch:
        """One sequence for each prompt, and copies of the first up to a power of two.

        Each entry of `images` is an image, a list of images or video frames, or None; all have
        equally many (see `group_by_image_count`). The text length is `min_length`, or that doubled
        as often as the longest prompt needs. `answers` are prefixes of answers to continue, "" for
        none: text that the model takes for its own, so it is not seen by the prompt. It is
        tokenized by itself, so it had better end where a word ends, without the space after it.
        Raises InvalidImageError and InvalidPromptError; nothing is ever truncated.
        """
        images = [None] * len(prompts) if images is None else images
        _check_batch(images, prompts)
        prompt_ids = [self._checked_ids(prompt) for prompt in prompts]
        prefixes = self._answer_prefixes(prompt_ids, answers)
        longest = max(len(ids) + len(more) for ids, more in zip(prompt_ids, prefixes, strict=True))
        length = max(longest, min(bucket(longest, min_length), self.max_text_length))
        rows = [
            prompt_arrays(ids, more, length) for ids, more in zip(prompt_ids, prefixes, strict=True)
        ]
        fill = bucket(len(rows)) - len(rows)
        pixels = self._pixels(images, allow_urls)
        return Batch(
            images=None if pixels is None else _fill(pixels, fill),
            tokens=_fill([row["text"] for row in rows], fill),
            mask_ar=_fill([row["mask_ar"] for row in rows], fill),
            mask_input=_fill([row["mask_input"] for row in rows], fill).astype(bool),
            row_mask=np.arange(len(rows) + fill) < len(rows),
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """bos, the prompt and the newline that separates it from the answer."""
        encode = self.tokenizer.encode
        if self.encoding == "big_vision":
            return [self.tokenizer.bos_id, *encode(prompt), *encode("\n")]
        return [self.tokenizer.bos_id, *encode(f"{prompt}\n")]

    def encode_train(
        self, prefix: str, suffix: str, length: int, on_overflow: Overflow = "error"
    ) -> Arrays:
        """big_vision's arrays for training with `text_len=length`.

        `text`, `mask_ar`, `mask_loss`, each i32[length + 1]: one longer than `length`, because a
        trainer takes all but the last position as inputs and all but the first as targets. Padding
        is 0, 1, 0. Source: `combine_and_keep_train`.
        """
        prompt = self.prompt_ids(prefix)
        answer = [*self.tokenizer.encode(suffix), self.tokenizer.eos_id]
        tokens = _fit([*prompt, *answer], length + 1, on_overflow)
        position = np.arange(length + 1)
        answered = position >= len(prompt)
        return {
            "text": _pad(tokens, length + 1),
            "mask_ar": answered.astype(np.int32),
            "mask_loss": (answered & (position < len(tokens))).astype(np.int32),
        }

    def encode_prompt(
        self, prefix: str, length: int, on_overflow: Overflow = "error", *, suffix: str = ""
    ) -> Arrays:
        """`prompt_arrays` of text; `suffix` is the beginning of an answer to continue."""
        more = self.tokenizer.encode(suffix)
        return prompt_arrays(self.prompt_ids(prefix), more, length, on_overflow)

    def to_dict(self) -> dict[str, Any]:
        """Settings as a plain dict, ready for JSON; the tokenizer is stored apart."""
        return {
            "image": self.image.to_dict(),
            "encoding": self.encoding,
            "max_text_length": self.max_text_length,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], tokenizer: Tokenizer) -> "Processor":
        """Inverse of `to_dict`; raises ConfigError for missing or unknown settings."""
        missing = [name for name in ("image", "encoding") if name not in values]
        if missing:
            raise ConfigError(
                f"The processor settings lack {' and '.join(missing)}. Convert the checkpoint "
                "again: paligemma convert SOURCE TARGET"
            )
        return cls(
            tokenizer=tokenizer,
            image=ImagePreprocessing.from_dict(values["image"]),
            encoding=values["encoding"],
            max_text_length=values.get("max_text_length", cls.max_text_length),
        )

    def _checked_ids(self, prompt: str) -> list[int]:
        limit = self.max_text_length
        if isinstance(prompt, str) and len(prompt) > limit * 4:
            # So long a text is not even tokenized if it cannot possibly fit.
            if len(prompt) > limit * self.tokenizer.longest_piece:
                raise _too_long(f"{len(prompt):,} characters", limit)
        ids = self.prompt_ids(prompt)
        if len(ids) > limit:
            raise _too_long(f"{len(ids):,} tokens", limit)
        return ids

    def _answer_prefixes(
        self, prompt_ids: Sequence[list[int]], answers: Sequence[str] | None
    ) -> list[list[int]]:
        """Ids of the answer prefixes, one list per prompt."""
        if answers is None:
            return [[] for _ in prompt_ids]
        if isinstance(answers, str) or len(answers) != len(prompt_ids):
            found = "one str" if isinstance(answers, str) else f"{len(answers)}"
            raise InvalidPromptError(
                f"Expected an answer prefix for each of {len(prompt_ids)} prompts ('' for none), "
                f"got {found}. Call processor([image], [prompt], answers=['a dog'])"
            )
        prefixes = [self.tokenizer.encode(answer) for answer in answers]
        for ids, more in zip(prompt_ids, prefixes, strict=True):
            if more and len(ids) + len(more) > self.max_text_length:
                size = f"{len(ids) + len(more):,} tokens with its answer prefix"
                raise _too_long(size, self.max_text_length)
        return prefixes

    def _pixels(self, images: Sequence[Entry], allow_urls: bool) -> list[np.ndarray] | None:
        """One f32[N, H, W, 3] a prompt, or None without images; equal objects are read once."""
        if not images_of(images[0]):
            return None
        pixels: dict[int, np.ndarray] = {}
        entries = [images_of(entry) for entry in images]  # kept alive: `pixels` goes by identity
        rows = []
        for number, sources in enumerate(entries):
            for source in sources:
                if id(source) not in pixels:
                    try:
                        pixels[id(source)] = self.image(source, allow_urls=allow_urls)
                    except InvalidImageError as e:
                        if len(images) == 1:
                            raise
                        raise InvalidImageError(f"images[{number}]: {e}") from e
            rows.append(np.stack([pixels[id(source)] for source in sources]))
        return rows


def prompt_arrays(
    prompt: Sequence[int],
    continuation: Sequence[int],
    length: int,
    on_overflow: Overflow = "error",
) -> Arrays:
    """big_vision's arrays for inference: `text`, `mask_ar`, `mask_input`, each i32[length].

    `prompt` begins with bos; `continuation` is the beginning of an answer to continue, often empty.
    Padding is 0, 1, 0. Source: `combine_and_keep_eval`.
    """
    tokens = _fit([*prompt, *continuation], length, on_overflow)
    position = np.arange(length)
    return {
        "text": _pad(tokens, length),
        "mask_ar": (position >= len(prompt)).astype(np.int32),
        "mask_input": (position < len(tokens)).astype(np.int32),
    }


def _fit(tokens: list[int], length: int, on_overflow: Overflow) -> list[int]:
    if on_overflow not in ("error", "truncate"):
        raise ConfigError(f'Expected on_overflow "error" or "truncate", got {on_overflow!r}.')
    if on_overflow == "error" and len(tokens) > length:
        raise InvalidPromptError(
            f"Expected at most {length} tokens (bos, newline, answer and eos included), got "
            f'{len(tokens)}. Shorten the text, or pass on_overflow="truncate".'
        )
    return tokens[:length]


def _pad(tokens: list[int], length: int) -> np.ndarray:
    text = np.full(length, Tokenizer.pad_id, np.int32)
    text[: len(tokens)] = tokens
    return text


def _check_batch(images: Sequence[Entry], prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not isinstance(images, list | tuple):
        raise InvalidPromptError(
            "Expected two lists of one length, got prompts of type "
            f"{type(prompts).__name__} and images of type {type(images).__name__}. Call "
            "processor([image], [prompt])"
        )
    if len(images) != len(prompts) or not prompts:
        raise InvalidPromptError(
            "Expected at least one prompt and an entry of images for each (a list of images, or "
            f"None, is one entry), got {len(images)} for {len(prompts)} prompts."
        )
    groups = group_by_image_count(images)
    if len(groups) > 1:
        found = ", ".join(f"{count} for prompt {places[0]}" for count, places in groups.items())
        raise InvalidPromptError(
            f"Expected equally many images for each prompt of a batch, got {found}. Make one batch "
            "of each group: group_by_image_count(images)"
        )


def _too_long(size: str, limit: int) -> InvalidPromptError:
    return InvalidPromptError(
        f"The prompt has {size}, bos and newline included. Expected at most {limit:,} tokens. "
        "Shorten it, or raise the limit: dataclasses.replace(processor, max_text_length=...)"
    )


def _fill(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Stacks, and repeats the first: what fills a batch is valid input like any other."""
    return np.stack([*rows, *[rows[0]] * fill])
