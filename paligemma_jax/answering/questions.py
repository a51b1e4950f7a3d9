"""Many prompts as few batches, whatever pictures each of them has."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax
import numpy as np

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.generation.constraint import Constraint
from paligemma_jax.generation.encoded import EncodedImages, group_by_picture_count, prepare
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.batch import Batch
from paligemma_jax.processing.processor import Entry, Processor

_A = TypeVar("_A")
_T = TypeVar("_T")
Pictures = Entry | EncodedImages  # of one prompt


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some of the questions, ready for the model.

    Attributes:
      places: which they are among all.
      batch: their words, and their pictures unless these are encoded.
      image_tokens: their pictures, encoded; None where `batch` has them.
    """

    places: Sequence[int]
    batch: Batch
    image_tokens: jax.Array | None

    def own(self, each: Sequence[_T]) -> list[_T]:
        """Of something that there is one of for every question, those of these."""
        return [each[place] for place in self.places]

    def own_constraint(
        self, constraint: Constraint | Sequence[Constraint] | None
    ) -> Constraint | list[Constraint] | None:
        """The one for all, or those of these."""
        return self.own(constraint) if isinstance(constraint, Sequence) else constraint


@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts with their pictures, and perhaps the beginnings of their answers; see `generate`.

    Raises InvalidPromptError for what is no list, or not one entry for each prompt.
    """

    images: Sequence[Pictures] | None
    prompts: Sequence[str]
    beginnings: Sequence[str] | None
    allow_urls: bool

    def __post_init__(self) -> None:
        images, prompts = self.images, self.prompts
        if isinstance(prompts, str) or not isinstance(images, Sequence | None):
            raise InvalidPromptError(
                f"A prompt of type {type(prompts).__name__} with images of type "
                f"{type(images).__name__} is no list of questions. Two lists, with one entry for "
                "each prompt, fit. Call generate([image], [prompt])[0]"
            )
        if images is not None and len(images) != len(prompts):
            raise InvalidPromptError(
                f"{len(images)} entries of images do not go with {len(prompts)} prompts. One for "
                "each prompt fits; it can be a list of pictures, or None."
            )
        self.check_each("beginnings", self.beginnings)

    def check_each(self, name: str, values: object) -> None:
        """Raises InvalidPromptError for a list not of one for each prompt."""
        if isinstance(values, str) or isinstance(values, Sequence) and len(values) != len(self):
            found = "One str" if isinstance(values, str) else f"A list of {len(values)}"
            raise InvalidPromptError(
                f"{found} as {name} does not go with {len(self)} prompts. A list with one for each "
                f"prompt fits. Pass {name}=[...] with {len(self)} entries"
            )

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    def seeds(self, seed: int | Sequence[int]) -> list[int]:
        """One a prompt: seed + i, or the given ones."""
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(len(self))]
        self.check_each("seed", seed)
        return [int(one) for one in seed]

    def answered(
        self,
        model: PaliGemma,
        processor: Processor,
        batch_size: int,
        answer: Callable[[Rows], Iterable[_A]],
    ) -> list[_A]:
        """What `answer` makes of every question, in order; it is called for a batch at a time.

        Raises InvalidImageError, InvalidPromptError, and ConfigError for batches of nothing.
        """
        if batch_size < 1:
            raise ConfigError(
                f"batch_size is {batch_size}; no prompt would ever be answered. At least 1 fits. "
                "Leave it out for the default."
            )
        entries = [None] * len(self) if self.images is None else self.images
        answers: dict[int, _A] = {}
        for places in group_by_picture_count(entries).values():
            for start in range(0, len(places), batch_size):
                chosen = places[start : start + batch_size]
                begun = self.beginnings
                batch, image_tokens = prepare(
                    model,
                    processor,
                    [entries[i] for i in chosen],
                    [self.prompts[i] for i in chosen],
                    answers=None if begun is None else [begun[i] for i in chosen],
                    allow_urls=self.allow_urls,
                )
                made = answer(Rows(chosen, batch, image_tokens))
                answers.update(zip(chosen, made, strict=True))
        return [answers[i] for i in range(len(self))]
