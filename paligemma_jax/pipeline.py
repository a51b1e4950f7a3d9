"""The object most people touch: a checkpoint with its processor, and a method for each task."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import InvalidPromptError, UnexpectedAnswerError
from paligemma_jax.generation import Greedy, Sampler, Temperature, generate
from paligemma_jax.models.abstract import to_params
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing import prompts
from paligemma_jax.processing.buckets import group_by_image_count
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.image_source import ImageSource, load_image
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.numbers import parse_number
from paligemma_jax.processing.processor import Entry, Processor
from paligemma_jax.processing.roboflow import picture_list
from paligemma_jax.weights.mask_vae import mask_vae_bytes
from paligemma_jax.weights.store import StoreContents, write_store
from paligemma_jax.weights.tree import flatten

MAX_NEW_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer: text, tokens up to and including EOS, and each token's log-probability (nats)."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model ready to be asked; made by `from_pretrained`.

    A picture is a path, PIL picture, HWC array (RGB), or the bytes of a file; see `load_image`.
    """

    model: PaliGemma
    processor: Processor
    mask_codec: MaskCodec | None = None

    @property
    def config(self) -> PaliGemmaConfig:
        """The model's architecture."""
        return self.model.config

    def caption(self, image: ImageSource, language: str = "en") -> str:
        """A short description; raises InvalidImageError, InvalidPromptError."""
        return self._ask(image, prompts.caption(language))

    def answer(
        self, image: ImageSource | Sequence[ImageSource], question: str, language: str = "en"
    ) -> str:
        """A short answer about one picture or several; raises as `caption`."""
        return self._ask(image, prompts.answer(question, language))

    def ocr(self, image: ImageSource) -> str:
        """The text in the picture."""
        return self._ask(image, prompts.ocr())

    def count(self, image: ImageSource, thing: str) -> int:
        """How many there are of `thing` (in the plural).

        Raises UnexpectedAnswerError if the model answers with something else than a number.
        """
        text = self._ask(image, prompts.count(thing))
        number = parse_number(text)
        if number is None:
            raise UnexpectedAnswerError(
                f"The model answered {text!r} to how many {thing} there are. A number would fit. "
                "Ask for its own words with answer()."
            )
        return number

    def detect(self, image: ImageSource, labels: str | Sequence[str]) -> Detections:
        """Boxes of one kind of thing, or of each of several; raises as `caption`."""
        picture = load_image(image)
        text = self._ask(picture, prompts.detect(labels))
        return Detections.from_text(text, *picture.size)

    def generate(
        self,
        images: Sequence[Entry] | None,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
        seed: int = 0,
        batch_size: int = 32,
        allow_urls: bool = False,
    ) -> list[Generation]:
        """Answers many prompts, each about its own pictures.

        Args:
          images: for each prompt a picture, a list of pictures (or video frames), or None; None
            instead of the list for prompts without pictures.
          prompts: the words, as the checkpoint was trained on them.
          max_new_tokens: where an answer without end is cut.
          sampler: how tokens are chosen.
          seed: prompt i draws from seed + i, whatever else is asked for at the same time.
          batch_size: prompts that go through the model together.
          allow_urls: whether a picture may be an http(s) address.

        Raises:
          InvalidImageError, InvalidPromptError: naming the entry that does not fit.
        """
        if isinstance(prompts, str) or not isinstance(images, Sequence | None):
            raise InvalidPromptError(
                f"generate() takes lists, not a prompt of type {type(prompts).__name__} with "
                f"images of type {type(images).__name__}. One entry for each prompt fits. Call "
                "generate([image], [prompt])[0]"
            )
        entries = [None] * len(prompts) if images is None else list(images)
        if len(entries) != len(prompts):
            self.processor(entries, prompts)  # raises, saying what fits
        answers: dict[int, Generation] = {}
        for places in group_by_image_count(entries).values():
            for start in range(0, len(places), batch_size):
                chosen = places[start : start + batch_size]
                batch = self.processor(
                    [entries[i] for i in chosen],
                    [prompts[i] for i in chosen],
                    allow_urls=allow_urls,
                )
                rows = generate(
                    self.model,
                    batch,
                    max_new_tokens=max_new_tokens,
                    sampler=sampler,
                    seed=[seed + i for i in chosen],
                    eos_id=self.processor.tokenizer.eos_id,
                )
                for place, row in zip(chosen, rows, strict=True):
                    text = self.processor.tokenizer.decode(row.tokens)
                    answers[place] = Generation(text, row.tokens, row.logprobs)
        return [answers[i] for i in range(len(prompts))]

    def prompt(
        self,
        images: Any,
        prompt: str,
        input_color_format: str | None = None,
        max_new_tokens: int = 400,
        do_sample: bool = False,
        skip_special_tokens: bool = True,
        seed: int = 0,
    ) -> list[str]:
        """One prompt about each of several pictures: the signature of Roboflow's `AutoModel`.

        numpy arrays are BGR, as OpenCV reads them, unless `input_color_format` is "rgb"; torch
        tensors are CHW and RGB. A list, or a 4-D array, is a batch of separate pictures.
        """
        pictures = picture_list(images, input_color_format)
        answers = self.generate(
            pictures,
            [prompt] * len(pictures),
            max_new_tokens=max_new_tokens,
            sampler=Temperature() if do_sample else Greedy(),
            seed=seed,
        )
        eos = self.processor.tokenizer.eos_id
        ends = ["" if skip_special_tokens or eos not in a.tokens else "<eos>" for a in answers]
        return [answer.text + end for answer, end in zip(answers, ends, strict=True)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a self-contained directory that `from_pretrained` reads; never replaces one."""
        arrays = flatten(to_params(self.model))
        write_store(
            Path(path).expanduser(),
            StoreContents(
                self.config,
                self.processor.to_dict(),
                self.processor.tokenizer.to_bytes(),
                None if self.mask_codec is None else mask_vae_bytes(self.mask_codec.model),
            ),
            ((name, np.asarray(array)) for name, array in arrays.items()),
            sum(array.nbytes for array in arrays.values()),
        )

    def _ask(self, image: Entry, prompt: str) -> str:
        return self.generate([image], [prompt])[0].text
