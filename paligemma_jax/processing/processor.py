"""Pictures and words -> Batch, the way the checkpoint was trained.

What to do with text that has more tokens than there is room for.

Prompt and answer -> token ids and masks, in the two ways PaliGemma's implementations do it.

Both give `bos prompt newline answer eos`. They differ where the end of the prompt merges with the
newline (a prompt that ends in a newline or spaces): big_vision tokenizes the newline on its own,
Hugging Face together with the prompt.

What a model takes: pictures, tokens and masks of several examples in arrays of one shape.

Few shapes for many requests: every new shape costs a compilation.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np

from paligemma_jax.errors import ConfigError, InvalidImageError, InvalidPromptError
from paligemma_jax.processing.image import ImagePreprocessing, ImageSource
from paligemma_jax.processing.tokenizer import Tokenizer


@runtime_checkable
class Overflow(Protocol):
    """Policy for more tokens than fit."""

    def fit(self, tokens: Sequence[int], length: int) -> list[int]:
        """At most `length` of `tokens`."""
        ...


@dataclasses.dataclass(frozen=True)
class Refuse:
    """Raises InvalidPromptError; the default everywhere."""

    def fit(self, tokens: Sequence[int], length: int) -> list[int]:
        if len(tokens) > length:
            raise InvalidPromptError(
                f"The text has {len(tokens)} tokens (bos, newline, answer and eos included). At "
                f"most {length} fit. Shorten it, raise the length, or cut it knowingly with "
                "on_overflow=Truncate()."
            )
        return list(tokens)


@dataclasses.dataclass(frozen=True)
class Truncate:
    """Cuts from the right as big_vision does: long answers lose eos, long prompts the newline."""

    def fit(self, tokens: Sequence[int], length: int) -> list[int]:
        return list(tokens[:length])


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


# Letters: B rows, N pictures a row, H W pixels, T text tokens.
Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples, right-padded to one text length and to one number of rows.

    Attributes:
      images: f32[B, N, H, W, 3] in [-1, 1]; None where there are no pictures.
      tokens: i32[B, T], starting with bos; 0 is padding.
      mask_ar: i32[B, T], 0 where a token and those before it see each other (prompt), 1 where it is
        seen only by later ones (answer and padding).
      mask_input: bool[B, T], False on padding.
      mask_loss: i32[B, T], 1 on the tokens to learn; None outside training.
      row_mask: bool[B], False on rows that only fill the batch; None if all are real.
    """

    images: Array | None
    tokens: Array
    mask_ar: Array
    mask_input: Array
    mask_loss: Array | None = None
    row_mask: Array | None = None


MIN_TEXT_LENGTH = 16


def bucket(size: int, minimum: int = 1) -> int:
    """The smallest of minimum, 2 minimum, 4 minimum, ... that holds `size`."""
    while minimum < size:
        minimum *= 2
    return minimum


def pictures_of(entry: Any) -> list[Any]:
    """The pictures of one prompt: none for None, several for a list, tuple or 4-D array."""
    if entry is None:
        return []
    if isinstance(entry, list | tuple) or (isinstance(entry, np.ndarray) and entry.ndim == 4):
        return list(entry)
    return [entry]


def group_by_image_count(images: Sequence[Any]) -> dict[int, list[int]]:
    """Number of pictures -> the places in `images` (one entry a prompt) that have that many.

    A batch holds prompts with equally many pictures; these are the batches to make.
    """
    groups: dict[int, list[int]] = {}
    for place, entry in enumerate(images):
        groups.setdefault(len(pictures_of(entry)), []).append(place)
    return groups


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
