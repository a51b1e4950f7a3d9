"""The object most people touch: a checkpoint with its processor, and a method for each task."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from paligemma_jax.answering.generation import Generation as Generation
from paligemma_jax.answering.objects import OnePicture, find_objects
from paligemma_jax.answering.prompted_model import MAX_NEW_TOKENS as MAX_NEW_TOKENS
from paligemma_jax.answering.prompted_model import PromptedModel
from paligemma_jax.answering.questions import Pictures
from paligemma_jax.errors import CheckpointError, UnexpectedAnswerError
from paligemma_jax.generation.classifying import Classification, classify
from paligemma_jax.generation.grammar import MAX_OBJECTS, detection_grammar, segmentation_grammar
from paligemma_jax.generation.sampling import Greedy, Temperature
from paligemma_jax.generation.scoring import ScoredAnswer, score
from paligemma_jax.models.model_recipe import recipe_of
from paligemma_jax.processing import prompts
from paligemma_jax.processing.candidates import check_labels
from paligemma_jax.processing.confidence import WeighedAnswer, box_score
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.numbers import parse_number
from paligemma_jax.processing.prompts import Labels
from paligemma_jax.processing.roboflow import picture_list
from paligemma_jax.processing.segmentations import Segmentations
from paligemma_jax.weights.arrays import DTypeLike
from paligemma_jax.weights.contents import Contents
from paligemma_jax.weights.export import export_weights
from paligemma_jax.weights.formats import Format
from paligemma_jax.weights.mask_vae import mask_vae_bytes
from paligemma_jax.weights.model_weights import model_weights
from paligemma_jax.weights.source import Progress

MAX_OBJECT_TOKENS = 512  # room for 20 masks or 60 boxes; an answer ends when it is complete


@dataclasses.dataclass(frozen=True)
class Pipeline(PromptedModel):
    """A model ready to be asked; made by `from_pretrained`.

    A picture is a path, PIL picture, HWC array (RGB), or the bytes of a file; see `load_image`.
    Where it is asked about more than once, `encode` it first and give what comes back instead.
    Prompts of your own: `generate`, `best_of`, `beam_search`, `stream`, `generate_by_lookup`.
    """

    mask_codec: MaskCodec | None = None

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

    def detect(self, image: OnePicture, labels: Labels) -> Detections:
        """Boxes with scores of one kind of thing, or of each of several; raises as `caption`.

        `labels` is a list, or "cat ; dog". The answer is well-formed and has no other labels (see
        `detection_grammar`); for what the model says freely: generate([image], ["detect cat"]).
        """
        return self.detect_batch([image], labels)[0]

    def detect_batch(
        self,
        images: Sequence[OnePicture],
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
        return find_objects(self, images, labels, prompts.detect, grammar, read, **limits)

    def segment(self, image: OnePicture, labels: Labels) -> Segmentations:
        """Boxes, scores and masks; `labels` as for `detect`.

        Raises CheckpointError without a mask codec, else as `caption`.
        """
        return self.segment_batch([image], labels)[0]

    def segment_batch(
        self,
        images: Sequence[OnePicture],
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
        return find_objects(self, images, labels, prompts.segment, grammar, read, **limits)

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

    def save(
        self,
        path: str | os.PathLike[str],
        format: str | Format = "orbax",
        *,
        dtype: DTypeLike = None,
        verify: bool = False,
        origin: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Writes a directory that `from_pretrained` reads; never replaces one.

        Adapters are merged, and weights of few bits are stored as they are. Peak memory beyond the
        model's is that of some layers.

        Args:
          path: which does not exist yet.
          format: "orbax" (our store, which keeps everything), "huggingface" (what transformers
            reads, too), "big_vision" (an npz where `path` ends in .npz, else a directory with one).
          dtype: of the floats written; the model's own otherwise.
          verify: reads what was written again, and compares it with the model.
          origin: what our store should tell of where the weights are from.
          progress: called with what is being written, bytes done and bytes in all.

        Raises CheckpointError where it cannot be written, and for a quantized model in a format
        that has room for floats only.
        """
        contents = Contents(
            self.processor.to_dict(),
            self.processor.tokenizer.to_bytes(),
            None if self.mask_codec is None else mask_vae_bytes(self.mask_codec.model),
            origin=origin or {},
            recipe=recipe_of(self.model),
        )
        export_weights(
            path,
            model_weights(self.model),
            contents,
            format,
            dtype=dtype,
            verify=verify,
            progress=progress,
        )

    def _ask(self, image: Pictures, prompt: str) -> str:
        return self.generate([image], [prompt])[0].text
