"""Pictures and words -> Batch, the way the checkpoint was trained."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.errors import ConfigError, InvalidImageError, InvalidPromptError
from paligemma_jax.processing.batch import Batch
from paligemma_jax.processing.buckets import (
    MIN_TEXT_LENGTH,
    bucket,
    group_by_image_count,
    pictures_of,
)
from paligemma_jax.processing.encoding import (
    Arrays,
    Encoding,
    ThreePieceEncoding,
    encoding_from_name,
    prompt_arrays,
    train_arrays,
)
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.processing.image_source import ImageSource
from paligemma_jax.processing.overflow import Overflow, Refuse
from paligemma_jax.processing.tokenizer import Tokenizer

Entry = ImageSource | Sequence[ImageSource] | None


@dataclasses.dataclass(frozen=True)
class Processor:
    """Tokenizer, picture preprocessing and text encoding of one checkpoint.

    `max_text_length` bounds the tokens of a prompt, bos and newline included, image tokens not; the
    default is the longest text that published checkpoints were trained with.
    """

    tokenizer: Tokenizer
    image: ImagePreprocessing
    encoding: Encoding = ThreePieceEncoding()
    max_text_length: int = 512

    def __call__(
        self,
        images: Sequence[Entry] | None,
        prompts: Sequence[str],
        *,
        answers: Sequence[str] | None = None,
        min_length: int = MIN_TEXT_LENGTH,
        allow_urls: bool = False,
    ) -> Batch:
        """One row for each prompt, and copies of the first row up to a power of two.

        Each entry of `images` is a picture, a list of pictures or video frames, or None; all rows
        have equally many (see `group_by_image_count`). The text length is `min_length`, or that
        doubled as often as the longest prompt needs. `answers` are beginnings to go on from, ""
        for none: text that the model takes for its own, so it is not seen by the prompt. Tokens
        are those of the beginning alone, so it had better end where a word ends, without the space
        after it. Raises InvalidImageError and InvalidPromptError; nothing is ever cut.
        """
        images = [None] * len(prompts) if images is None else images
        _check_rows(images, prompts)
        prompt_ids = [self._prompt_ids(prompt) for prompt in prompts]
        begun = self._begun(prompt_ids, answers)
        longest = max(len(ids) + len(more) for ids, more in zip(prompt_ids, begun, strict=True))
        length = max(longest, min(bucket(longest, min_length), self.max_text_length))
        rows = [
            prompt_arrays(ids, more, length, Refuse())
            for ids, more in zip(prompt_ids, begun, strict=True)
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

    def encode_train(
        self, prefix: str, suffix: str, length: int, on_overflow: Overflow | None = None
    ) -> Arrays:
        """`text`, `mask_ar`, `mask_loss`, i32[length + 1]: big_vision's for `text_len=length`.

        Text that does not fit raises InvalidPromptError unless `on_overflow=Truncate()`.
        """
        answer = [*self.tokenizer.encode(suffix), self.tokenizer.eos_id]
        prompt = self.encoding.prompt_ids(self.tokenizer, prefix)
        return train_arrays(prompt, answer, length, on_overflow or Refuse())

    def encode_prompt(
        self, prefix: str, length: int, on_overflow: Overflow | None = None, *, suffix: str = ""
    ) -> Arrays:
        """`text`, `mask_ar`, `mask_input`, i32[length]: big_vision's arrays for inference.

        A `suffix` is a beginning of the answer to go on from. Text that does not fit raises
        InvalidPromptError unless `on_overflow=Truncate()`.
        """
        prompt = self.encoding.prompt_ids(self.tokenizer, prefix)
        return prompt_arrays(prompt, self.tokenizer.encode(suffix), length, on_overflow or Refuse())

    def to_dict(self) -> dict[str, Any]:
        """Settings as a plain dict, ready for JSON; the tokenizer is stored apart."""
        return {
            "image": self.image.to_dict(),
            "encoding": self.encoding.name,
            "max_text_length": self.max_text_length,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], tokenizer: Tokenizer) -> "Processor":
        """Inverse of `to_dict`; raises ConfigError for missing or unknown settings."""
        missing = [name for name in ("image", "encoding") if name not in values]
        if missing:
            raise ConfigError(
                f"The processor settings lack {' and '.join(missing)}. A processor.json as this "
                "library writes it fits. Convert the checkpoint again: "
                "paligemma convert SOURCE TARGET"
            )
        return cls(
            tokenizer=tokenizer,
            image=ImagePreprocessing.from_dict(values["image"]),
            encoding=encoding_from_name(values["encoding"]),
            max_text_length=values.get("max_text_length", cls.max_text_length),
        )

    def _prompt_ids(self, prompt: str) -> list[int]:
        limit = self.max_text_length
        if isinstance(prompt, str) and len(prompt) > limit * 4:
            # So long a text is not even tokenized if it cannot possibly fit.
            if len(prompt) > limit * self.tokenizer.longest_piece:
                raise _too_long(f"{len(prompt):,} characters", limit)
        ids = self.encoding.prompt_ids(self.tokenizer, prompt)
        if len(ids) > limit:
            raise _too_long(f"{len(ids):,} tokens", limit)
        return ids

    def _begun(
        self, prompt_ids: Sequence[list[int]], answers: Sequence[str] | None
    ) -> list[list[int]]:
        """Ids of the beginnings of answers, one for each prompt."""
        if answers is None:
            return [[] for _ in prompt_ids]
        if isinstance(answers, str) or len(answers) != len(prompt_ids):
            found = "One str" if isinstance(answers, str) else f"{len(answers)} answers"
            raise InvalidPromptError(
                f"{found} to go on from, for {len(prompt_ids)} prompts, is no batch. A list with a "
                "beginning for each prompt, '' for none, fits. "
                "Call processor([image], [prompt], answers=['a dog'])"
            )
        begun = [self.tokenizer.encode(answer) for answer in answers]
        for ids, more in zip(prompt_ids, begun, strict=True):
            if more and len(ids) + len(more) > self.max_text_length:
                size = f"{len(ids) + len(more):,} tokens with the beginning of its answer"
                raise _too_long(size, self.max_text_length)
        return begun

    def _pixels(self, images: Sequence[Entry], allow_urls: bool) -> list[np.ndarray] | None:
        """One f32[N, H, W, 3] a row, or None without pictures; equal objects are read once."""
        if not pictures_of(images[0]):
            return None
        seen: dict[int, np.ndarray] = {}
        entries = [pictures_of(entry) for entry in images]  # kept alive: `seen` goes by identity
        rows = []
        for number, pictures in enumerate(entries):
            for picture in pictures:
                if id(picture) not in seen:
                    try:
                        seen[id(picture)] = self.image(picture, allow_urls=allow_urls)
                    except InvalidImageError as e:
                        if len(images) == 1:
                            raise
                        raise InvalidImageError(f"images[{number}]: {e}") from e
            rows.append(np.stack([seen[id(picture)] for picture in pictures]))
        return rows


def _check_rows(images: Sequence[Entry], prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not isinstance(images, list | tuple):
        raise InvalidPromptError(
            f"Prompts of type {type(prompts).__name__} with images of type "
            f"{type(images).__name__} are no batch. Two lists, with an entry for each row, fit. "
            "Call processor([image], [prompt])"
        )
    if len(images) != len(prompts) or not prompts:
        raise InvalidPromptError(
            f"{len(images)} entries of images do not go with {len(prompts)} prompts. One entry for "
            "each prompt, and at least one prompt, fit. An entry can be a list of pictures or None."
        )
    groups = group_by_image_count(images)
    if len(groups) > 1:
        found = ", ".join(f"{count} for prompt {places[0]}" for count, places in groups.items())
        raise InvalidPromptError(
            f"The prompts of this batch differ in their number of pictures: {found}. Equally many "
            "for each prompt fit. Make one batch of each group: group_by_image_count(images)"
        )


def _too_long(size: str, limit: int) -> InvalidPromptError:
    return InvalidPromptError(
        f"The prompt has {size}, bos and newline included. At most {limit:,} tokens fit. Shorten "
        "it, or raise the limit: dataclasses.replace(processor, max_text_length=...)"
    )


def _fill(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Stacks, and repeats the first row: filling rows are valid input like any other."""
    return np.stack([*rows, *[rows[0]] * fill])
