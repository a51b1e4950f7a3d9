"""The object most people touch: a checkpoint with its processor, and a method for each task."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import (
    CheckpointError,
    InvalidImageError,
    InvalidPromptError,
    UnexpectedAnswerError,
)
from paligemma_jax.generation.classifying import Classification, classify
from paligemma_jax.generation.constraint import Constraint
from paligemma_jax.generation.encoded import (
    EncodedImages,
    encode,
    group_by_picture_count,
    prepare,
)
from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.grammar import (
    MAX_OBJECTS,
    ObjectGrammar,
    detection_grammar,
    segmentation_grammar,
)
from paligemma_jax.generation.observer import BoxEvidence, Observer
from paligemma_jax.generation.sampling import Greedy, Sampler, Temperature
from paligemma_jax.generation.scoring import ScoredAnswer, score
from paligemma_jax.models.abstract import to_params
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing import prompts
from paligemma_jax.processing.candidates import check_labels
from paligemma_jax.processing.confidence import WeighedAnswer, box_score, weigh_tokens
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.image_source import ImageSource, load_image
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.numbers import parse_number
from paligemma_jax.processing.processor import Entry, Processor
from paligemma_jax.processing.prompts import Labels
from paligemma_jax.processing.roboflow import picture_list
from paligemma_jax.processing.segmentations import Segmentations
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.weights.mask_vae import mask_vae_bytes
from paligemma_jax.weights.store import StoreContents, write_store
from paligemma_jax.weights.tree import flatten

_Found = TypeVar("_Found")
Pictures = Entry | EncodedImages  # of one prompt
MAX_NEW_TOKENS = 128
MAX_OBJECT_TOKENS = 512  # room for 20 masks or 60 boxes; an answer ends when it is complete


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer: text, tokens up to and including EOS, and each token's log-probability (nats).

    `evidence` holds an observer's numbers for each token, where there was one.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    evidence: tuple[tuple[float, ...], ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model ready to be asked; made by `from_pretrained`.

    A picture is a path, PIL picture, HWC array (RGB), or the bytes of a file; see `load_image`.
    Where it is asked about more than once, `encode` it first and give what comes back instead.
    """

    model: PaliGemma
    processor: Processor
    mask_codec: MaskCodec | None = None

    @property
    def config(self) -> PaliGemmaConfig:
        """The model's architecture."""
        return self.model.config

    def encode(self, images: Entry) -> EncodedImages:
        """A picture, or the several of one prompt, through the image encoder once, for all methods.

        Raises InvalidImageError. See `paligemma_jax.generation.encoded` for what can be shared.
        """
        return encode(self.model, self.processor.image, images)

    def caption(self, image: Pictures, language: str = "en") -> str:
        """A short description; raises InvalidImageError, InvalidPromptError."""
        return self._ask(image, prompts.caption(language))

    def answer(self, image: Pictures, question: str, language: str = "en") -> str:
        """A short answer about one picture or several; raises as `caption`."""
        return self._ask(image, prompts.answer(question, language))

    def ocr(self, image: Pictures) -> str:
        """The text in the picture."""
        return self._ask(image, prompts.ocr())

    def count(self, image: Pictures, thing: str) -> int:
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

    def detect(self, image: ImageSource | EncodedImages, labels: Labels) -> Detections:
        """Boxes with scores of one kind of thing, or of each of several; raises as `caption`.

        `labels` is a list, or "cat ; dog". The answer is well-formed and has no other labels (see
        `detection_grammar`); for what the model says freely: generate([image], ["detect cat"]).
        """
        return self.detect_batch([image], labels)[0]

    def detect_batch(
        self,
        images: Sequence[ImageSource | EncodedImages],
        labels: Labels | Sequence[Sequence[str]],
        *,
        max_objects: int = MAX_OBJECTS,
        max_new_tokens: int = MAX_OBJECT_TOKENS,
        batch_size: int = 32,
    ) -> list[Detections]:
        """`detect` for many pictures; `labels` are those of every picture, or one list each."""

        def read(answer: WeighedAnswer, width: int, height: int) -> Detections:
            return Detections.from_answer(answer.answer, width, height, answer.scores(box_score))

        limits = dict(max_new_tokens=max_new_tokens, batch_size=batch_size)
        grammar = functools.partial(detection_grammar, max_objects=max_objects)
        return self._find(images, labels, prompts.detect, grammar, read, **limits)

    def segment(self, image: ImageSource | EncodedImages, labels: Labels) -> Segmentations:
        """Boxes, scores and masks; `labels` as for `detect`.

        Raises CheckpointError without a mask codec, else as `caption`.
        """
        return self.segment_batch([image], labels)[0]

    def segment_batch(
        self,
        images: Sequence[ImageSource | EncodedImages],
        labels: Labels | Sequence[Sequence[str]],
        *,
        max_objects: int = MAX_OBJECTS,
        max_new_tokens: int = MAX_OBJECT_TOKENS,
        batch_size: int = 32,
    ) -> list[Segmentations]:
        """`segment` for many pictures; `labels` are those of every picture, or one list each."""
        codec = self.mask_codec
        if codec is None:
            raise CheckpointError(
                "The checkpoint has no mask codec, which turns <seg> tokens into masks. The "
                "published vae-oid.npz fits every PaliGemma. Put it beside the weights, or load "
                "with from_pretrained(..., mask_codec='vae-oid.npz') (--mask-codec vae-oid.npz)."
            )

        def read(answer: WeighedAnswer, width: int, height: int) -> Segmentations:
            scores = answer.scores(box_score)
            return Segmentations.decoded(answer.answer, width, height, codec.decode, scores)

        limits = dict(max_new_tokens=max_new_tokens, batch_size=batch_size)
        grammar = functools.partial(segmentation_grammar, max_objects=max_objects)
        return self._find(images, labels, prompts.segment, grammar, read, **limits)

    def score(self, image: Pictures, prompt: str, candidates: Sequence[str]) -> list[ScoredAnswer]:
        """How likely (log-probability, nats) each of the given answers is, in the order given.

        Picture and prompt are read once for all candidates. Raises as `caption`.
        """
        return score(self.model, self.processor, [image], [prompt], [candidates])[0]

    def score_batch(
        self,
        images: Sequence[Pictures] | None,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        *,
        batch_size: int = 32,
    ) -> list[list[ScoredAnswer]]:
        """`score` for many prompts, each with its own pictures and candidates."""
        return score(self.model, self.processor, images, prompts, candidates, batch_size=batch_size)

    def classify(
        self,
        image: Pictures,
        labels: Sequence[str],
        question: str = "what is in the image?",
        language: str = "en",
    ) -> Classification:
        """Which of the labels answers the question best, with a probability for each.

        Raises InvalidPromptError for labels that are empty or come twice, else as `caption`.
        """
        check_labels(labels)
        return classify(self.score(image, prompts.answer(question, language), labels))

    def generate(
        self,
        images: Sequence[Pictures] | None,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
        seed: int = 0,
        constraint: Constraint | Sequence[Constraint] | None = None,
        observer: Observer | None = None,
        batch_size: int = 32,
        allow_urls: bool = False,
    ) -> list[Generation]:
        """Answers many prompts, each about its own pictures.

        Args:
          images: for each prompt a picture, a list of pictures (or video frames), what `encode`
            made of them, or None; None instead of the list for prompts without pictures.
          prompts: the words, as the checkpoint was trained on them.
          max_new_tokens: where an answer without end is cut.
          sampler: how tokens are chosen.
          seed: prompt i draws from seed + i, whatever else is asked for at the same time.
          constraint: what may be answered, such as `allowed_answers`; one for all, or one a prompt.
          observer: what to note down about every token.
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
            raise InvalidPromptError(
                f"{len(entries)} entries of images do not go with {len(prompts)} prompts. One for "
                "each prompt fits; it can be a list of pictures, or None."
            )
        tokenizer = self.processor.tokenizer
        answers: dict[int, Generation] = {}
        for places in group_by_picture_count(entries).values():
            for start in range(0, len(places), batch_size):
                chosen = places[start : start + batch_size]
                batch, image_tokens = prepare(
                    self.model,
                    self.processor,
                    [entries[i] for i in chosen],
                    [prompts[i] for i in chosen],
                    allow_urls=allow_urls,
                )
                allowed = constraint
                if isinstance(constraint, Sequence):
                    allowed = [constraint[i] for i in chosen]
                rows = generate(
                    self.model,
                    batch,
                    max_new_tokens=max_new_tokens,
                    sampler=sampler,
                    seed=[seed + i for i in chosen],
                    eos_id=tokenizer.eos_id,
                    constraint=allowed,
                    observer=observer,
                    image_tokens=image_tokens,
                )
                for place, row in zip(chosen, rows, strict=True):
                    text = tokenizer.decode(row.tokens)
                    answers[place] = Generation(text, row.tokens, row.logprobs, row.evidence)
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

    def _ask(self, image: Pictures, prompt: str) -> str:
        return self.generate([image], [prompt])[0].text

    def _find(
        self,
        images: Sequence[ImageSource | EncodedImages],
        labels: Labels | Sequence[Sequence[str]],
        prompt_of: Callable[[Labels], str],
        grammar_of: Callable[[Tokenizer, Labels], ObjectGrammar],
        read: Callable[[WeighedAnswer, int, int], _Found],
        *,
        max_new_tokens: int,
        batch_size: int,
    ) -> list[_Found]:
        """What `read` makes of each answer and of the width and height of its picture."""
        tokenizer = self.processor.tokenizer
        every_row = prompts.spread_labels(labels, len(images))
        grammars = {row: grammar_of(tokenizer, row) for row in set(every_row)}
        found = []
        for start in range(0, len(images), batch_size):
            pictures = [_one_picture(image) for image in images[start : start + batch_size]]
            rows = every_row[start : start + batch_size]
            same = len(set(rows)) == 1
            answers = self.generate(
                pictures,
                [prompt_of(row) for row in rows],
                max_new_tokens=max_new_tokens,
                constraint=grammars[rows[0]] if same else [grammars[row] for row in rows],
                observer=BoxEvidence(tokenizer.loc_start),
                batch_size=batch_size,
            )
            for picture, answer in zip(pictures, answers, strict=True):
                weighed = weigh_tokens(answer.tokens, answer.logprobs, tokenizer, answer.evidence)
                size = picture.sizes[0] if isinstance(picture, EncodedImages) else picture.size
                found.append(read(weighed, *size))
        return found


def _one_picture(image: ImageSource | EncodedImages) -> Image.Image | EncodedImages:
    """With its size; InvalidImageError for several pictures, of which boxes would say nothing."""
    if not isinstance(image, EncodedImages):
        return load_image(image)
    if len(image) != 1:
        raise InvalidImageError(
            f"Boxes are of one picture, and {len(image)} were encoded together. One fits. "
            "Encode each by itself: pali.encode(image)"
        )
    return image
