"""The object most people touch: a checkpoint with its processor, and a method for each task."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError, UnexpectedAnswerError
from paligemma_jax.generation import Greedy, Sampler, Temperature, generate
from paligemma_jax.models.abstract import from_params, to_params
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing import prompts
from paligemma_jax.processing.buckets import group_by_image_count
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.image_source import ImageSource, load_image
from paligemma_jax.processing.numbers import parse_number
from paligemma_jax.processing.processor import Entry, Processor
from paligemma_jax.processing.roboflow import picture_list
from paligemma_jax.resolve import find_checkpoint
from paligemma_jax.weights.checkpoint import Checkpoint, open_checkpoint
from paligemma_jax.weights.load import load_from
from paligemma_jax.weights.source import Progress
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
        entries = [None] * len(prompts) if images is None else list(images)
        if len(entries) != len(prompts) or isinstance(prompts, str):
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
                self.config, self.processor.to_dict(), self.processor.tokenizer.to_bytes()
            ),
            ((name, np.asarray(array)) for name, array in arrays.items()),
            sum(array.nbytes for array in arrays.values()),
        )

    def _ask(self, image: Entry, prompt: str) -> str:
        return self.generate([image], [prompt])[0].text


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    resolution: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    config: PaliGemmaConfig | None = None,
    progress: Progress | None = None,
) -> Pipeline:
    """Loads a checkpoint of any format, with the preprocessing it was trained with.

    Args:
      name_or_path: "demo", a Hugging Face directory, a big_vision .npz, or a directory written by
        `paligemma convert` or `Pipeline.save`.
      dtype: of weights and activations: "bfloat16", or "float32" for parity (on CPUs for speed).
      resolution: resample the position embeddings to pictures of so many pixels a side.
      tokenizer: a tokenizer.model, for an .npz that has none beside it.
      config: the architecture, where the file cannot tell it.
      progress: called with what is being read, bytes done and bytes in all.

    Raises:
      CheckpointError: naming everything that does not fit.
    """
    if dtype not in ("bfloat16", "float32", "float16"):
        raise ConfigError(
            f"dtype {dtype!r} is unknown. 'bfloat16', 'float32' or 'float16' fits. Pass "
            "dtype='float32'."
        )
    path = find_checkpoint(name_or_path)
    words = None if tokenizer is None else Path(tokenizer)
    with open_checkpoint(path, config=config, tokenizer=words) as checkpoint:
        processor = _processor(checkpoint, resolution)
        loaded, params = load_from(checkpoint, dtype, resolution=resolution, progress=progress)
    return Pipeline(from_params(loaded, params, dtype), processor)


def load_model(
    path: str | os.PathLike[str],
    config: PaliGemmaConfig | None = None,
    dtype: str = "bfloat16",
) -> PaliGemma:
    """The model alone, without a tokenizer; `config` is inferred where the file can tell it."""
    with open_checkpoint(find_checkpoint(path), config=config) as checkpoint:
        loaded, params = load_from(checkpoint, dtype)
    return from_params(loaded, params, dtype)


def load_processor(path: str | os.PathLike[str]) -> Processor:
    """The processor alone: tokenizer, picture preprocessing and text encoding of a checkpoint."""
    with open_checkpoint(find_checkpoint(path)) as checkpoint:
        return _processor(checkpoint, None)


def _processor(checkpoint: Checkpoint, resolution: int | None) -> Processor:
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise CheckpointError(
            f"There is no tokenizer beside {checkpoint.path}. A tokenizer.model of PaliGemma fits. "
            "Copy it there, or pass tokenizer='tokenizer.model' (--tokenizer tokenizer.model)."
        )
    processor = Processor.from_dict(checkpoint.processor_settings, tokenizer)
    if resolution is None:
        return processor
    image = dataclasses.replace(processor.image, size=resolution)
    return dataclasses.replace(processor, image=image)
