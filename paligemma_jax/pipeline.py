"""Answers as text, with the numbers that came with them.

Many prompts as few batches, whatever pictures each of them has.

A model with its processor, and every way to have it answer a prompt of the user's own.

The same question for objects about many pictures, held to its grammar.

Pictures as Roboflow's `model.prompt` takes them: OpenCV arrays and torch tensors.

The object most people touch: a checkpoint with its processor, and a method for each task.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from PIL import Image

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import (
    CheckpointError,
    ConfigError,
    InvalidImageError,
    InvalidPromptError,
    UnexpectedAnswerError,
)
from paligemma_jax.generation.beam_search import BeamAnswer, EndAnytime, Ending, beam_search
from paligemma_jax.generation.constraints import Constraint
from paligemma_jax.generation.decode import (
    BoxEvidence,
    GeneratedTokens,
    Observer,
    best_of,
    generate,
)
from paligemma_jax.generation.detection_grammar import (
    MAX_OBJECTS,
    ObjectGrammar,
    detection_grammar,
    segmentation_grammar,
)
from paligemma_jax.generation.image_embeddings import (
    EncodedImages,
    encode,
    group_by_picture_count,
    prepare,
)
from paligemma_jax.generation.prompt_lookup import (
    GUESSES,
    LONGEST,
    LookedUpTokens,
    generate_by_lookup,
)
from paligemma_jax.generation.sampling import Greedy, Sampler, Temperature
from paligemma_jax.generation.scoring import Classification, ScoredAnswer, classify, score
from paligemma_jax.generation.stop_strings import StopStrings
from paligemma_jax.generation.streaming import CHUNK, stream
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization import recipe_of
from paligemma_jax.processing import prompts
from paligemma_jax.processing.box_scores import WeighedAnswer, box_score, weigh_tokens
from paligemma_jax.processing.detections import Detections, Segmentations
from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.processor import Batch, Entry, Processor
from paligemma_jax.processing.prompts import Labels, check_labels, parse_number
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.weights.companions import Contents
from paligemma_jax.weights.convert import Format, export_weights
from paligemma_jax.weights.mask_vae import mask_vae_bytes
from paligemma_jax.weights.tensors import DTypeLike, Progress
from paligemma_jax.weights.views import model_weights


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      text: what was answered, without the stop string that ended it; after the beginning, where
        the answer had one.
      tokens: up to and including what ended the answer: EOS, the token with which a stop string was
        complete, or the last of as many as were allowed.
      logprobs: log-probability (nats) of each token: the model's own, whatever sampler and
        constraint did to the distribution.
      evidence: an observer's numbers for each token, where there was one.
      stop: the stop string that ended the answer, None if none did.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    evidence: tuple[tuple[float, ...], ...] = ()
    stop: str | None = None

    @property
    def logprob(self) -> float:
        """Log-probability (nats) of all tokens together, what ended the answer included."""
        return math.fsum(self.logprobs)

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class LookedUpGeneration(Generation):
    """An answer by prompt lookup, and what the guesses were worth.

    Attributes:
      passes: through the decoder, the one of the prompt included.
      tokens_a_pass: that a pass after the prompt's gave: 1.0 if no guess was ever right.
    """

    passes: int = 0
    tokens_a_pass: float = 1.0


@dataclasses.dataclass(frozen=True)
class BeamGeneration:
    """One answer that beam search found.

    Attributes:
      text: what was answered; after the beginning, where the answer had one.
      tokens: up to and including EOS; without EOS where it was cut.
      logprob: log-probability (nats) of the whole answer.
      score: `logprob / len(tokens) ** alpha`, by which answers are ranked.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    score: float

    def __str__(self) -> str:
        return self.text


def as_generation(row: GeneratedTokens, tokenizer: Tokenizer) -> Generation:
    """What `generate` and `best_of` give as tokens."""
    text = tokenizer.decode(row.tokens)[: row.text_length]
    return Generation(text, row.tokens, row.logprobs, row.evidence, row.stop)


def as_looked_up(row: LookedUpTokens, tokenizer: Tokenizer) -> LookedUpGeneration:
    """What `generate_by_lookup` gives as tokens."""
    return LookedUpGeneration(
        tokenizer.decode(row.tokens),
        row.tokens,
        row.logprobs,
        row.evidence,
        passes=row.passes,
        tokens_a_pass=row.tokens_a_pass,
    )


def as_beam_generation(found: BeamAnswer, tokenizer: Tokenizer) -> BeamGeneration:
    """What `beam_search` gives as tokens."""
    text = tokenizer.decode(found.tokens)
    return BeamGeneration(text, found.tokens, found.logprob, found.score)


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


MAX_NEW_TOKENS = 128
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class PromptedModel:
    """What a `Pipeline` is beneath its tasks: prompts go to the model as they are.

    A row's answer does not depend on what else is asked for at the same time.
    """

    model: PaliGemma
    processor: Processor

    @property
    def config(self) -> PaliGemmaConfig:
        """The model's architecture."""
        return self.model.config

    def encode(self, images: Entry) -> EncodedImages:
        """A picture, or the several of one prompt, through the image encoder once, for all methods.

        Raises InvalidImageError. `paligemma_jax.generation.image_embeddings` says what is shared.
        """
        return encode(self.model, self.processor.image, images)

    def generate(
        self,
        images: Sequence[Pictures] | None,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        min_new_tokens: int = 0,
        sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
        seed: int | Sequence[int] = 0,
        constraint: Constraint | Sequence[Constraint] | None = None,
        observer: Observer | None = None,
        stop: str | Sequence[str] | None = None,
        beginnings: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
        allow_urls: bool = False,
    ) -> list[Generation]:
        """Answers many prompts, each about its own pictures.

        Args:
          images: for each prompt a picture, a list of pictures (or video frames), what `encode`
            made of them, or None; None instead of the list for prompts without pictures.
          prompts: the words, as the checkpoint was trained on them.
          max_new_tokens: where an answer without end is cut.
          min_new_tokens: an answer does not end before so many, unless `constraint` or `stop`
            ends it.
          sampler: how tokens are chosen: `Greedy`, `Temperature`, `TopK`, `Nucleus`, `MinP`, or a
            `Chain` of them.
          seed: prompt i draws from seed + i, whatever else is asked for at the same time; or one
            a prompt.
          constraint: what may be answered, such as `allowed_answers`; one for all, or one a prompt.
          observer: what to note down about every token.
          stop: text, or several, at which an answer ends; it is cut before it.
          beginnings: of the answers, one a prompt, to go on from; "" for none. The model takes it
            for words of its own, so the prompt does not see it. It had better end where a word
            ends, without the space after it. Answers are what comes then, and limits count that.
          batch_size: prompts that go through the model together.
          allow_urls: whether a picture may be an http(s) address.

        Raises:
          InvalidImageError, InvalidPromptError: naming the entry that does not fit.
          ConfigError: for limits or constraints that no answer could keep.
        """
        questions = Questions(images, prompts, beginnings, allow_urls)
        questions.check_each("constraint", constraint)
        seeds, tokenizer = questions.seeds(seed), self.processor.tokenizer
        stop_strings = None if stop is None else StopStrings(tokenizer, stop)

        def answer(rows: Rows) -> list[Generation]:
            made = generate(
                self.model,
                rows.batch,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                sampler=sampler,
                seed=rows.own(seeds),
                eos_id=tokenizer.eos_id,
                constraint=rows.own_constraint(constraint),
                observer=observer,
                stop=stop_strings,
                image_tokens=rows.image_tokens,
            )
            return [as_generation(row, tokenizer) for row in made]

        return questions.answered(self.model, self.processor, batch_size, answer)

    def best_of(
        self,
        images: Sequence[Pictures] | None,
        prompts: Sequence[str],
        *,
        samples: int,
        alpha: float = 0.0,
        max_new_tokens: int = MAX_NEW_TOKENS,
        min_new_tokens: int = 0,
        sampler: Sampler = Temperature(),  # noqa: B008 (frozen)
        seed: int | Sequence[int] = 0,
        constraint: Constraint | Sequence[Constraint] | None = None,
        observer: Observer | None = None,
        stop: str | Sequence[str] | None = None,
        beginnings: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
        allow_urls: bool = False,
    ) -> list[list[Generation]]:
        """`samples` drawn answers to each prompt, best first; pictures and prompt are read once.

        The first one drawn is that of `generate` with the same seed and sampler.

        Args:
          samples: answers a prompt; equal ones are not removed.
          alpha: answers are ranked by logprob / len(tokens) ** alpha: 0 ranks by probability, which
            favours short answers, 1 by the mean log-probability of a token.
          batch_size: answers, not prompts, that are drawn together; all those to one prompt are.
          images, prompts, max_new_tokens, min_new_tokens, sampler, seed, constraint, observer,
            stop, beginnings, allow_urls: as for `generate`.

        Raises:
          ConfigError: for less than one sample, and several without a sampler that draws; else as
            `generate`.
        """
        questions = Questions(images, prompts, beginnings, allow_urls)
        questions.check_each("constraint", constraint)
        seeds, tokenizer = questions.seeds(seed), self.processor.tokenizer
        stop_strings = None if stop is None else StopStrings(tokenizer, stop)

        def answer(rows: Rows) -> list[list[Generation]]:
            made = best_of(
                self.model,
                rows.batch,
                samples=samples,
                alpha=alpha,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                sampler=sampler,
                seed=rows.own(seeds),
                eos_id=tokenizer.eos_id,
                constraint=rows.own_constraint(constraint),
                observer=observer,
                stop=stop_strings,
                image_tokens=rows.image_tokens,
            )
            return [[as_generation(drawn, tokenizer) for drawn in row] for row in made]

        prompts_at_once = _share(batch_size, samples)
        return questions.answered(self.model, self.processor, prompts_at_once, answer)

    def beam_search(
        self,
        images: Sequence[Pictures] | None,
        prompts: Sequence[str],
        *,
        beams: int = 4,
        alpha: float = 0.0,
        answers: int = 1,
        ending: Ending = EndAnytime(),  # noqa: B008 (frozen)
        max_new_tokens: int = MAX_NEW_TOKENS,
        constraint: Constraint | Sequence[Constraint] | None = None,
        beginnings: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
        allow_urls: bool = False,
    ) -> list[list[BeamGeneration]]:
        """The likeliest answers that a search of limited width finds for each prompt, best first.

        An empty list for a prompt if no answer of `max_new_tokens` keeps the constraint and ends.

        Args:
          beams: beginnings that are followed; more find likelier answers and cost more.
          alpha: of the score, as for `best_of`.
          answers: how many are returned at most for each prompt.
          ending: when an answer ends: `EndAnytime`, big_vision's rule, or `EndWhenRanked`, Hugging
            Face's.
          batch_size: beams, not prompts, that go through the model together; all of one prompt do.
          images, prompts, max_new_tokens, constraint, beginnings, allow_urls: as for `generate`.

        Raises:
          ConfigError: for less than one beam or answer, or more beams than tokens to choose from;
            else as `generate`.
        """
        questions = Questions(images, prompts, beginnings, allow_urls)
        questions.check_each("constraint", constraint)
        tokenizer = self.processor.tokenizer

        def answer(rows: Rows) -> list[list[BeamGeneration]]:
            found = beam_search(
                self.model,
                rows.batch,
                beams=beams,
                max_new_tokens=max_new_tokens,
                alpha=alpha,
                answers=answers,
                ending=ending,
                eos_id=tokenizer.eos_id,
                constraint=rows.own_constraint(constraint),
                image_tokens=rows.image_tokens,
            )
            return [[as_beam_generation(one, tokenizer) for one in row] for row in found]

        prompts_at_once = _share(batch_size, beams)
        return questions.answered(self.model, self.processor, prompts_at_once, answer)

    def stream(
        self,
        image: Pictures,
        prompt: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        min_new_tokens: int = 0,
        sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
        seed: int = 0,
        constraint: Constraint | None = None,
        stop: str | Sequence[str] | None = None,
        beginning: str = "",
        chunk: int = CHUNK,
        allow_urls: bool = False,
    ) -> Generator[str, None, None]:
        """The answer to one prompt in pieces, while it is made.

        Joined they are the text that `generate` gives. A piece comes every `chunk` tokens and never
        ends inside a character; while the caller holds one, the device works on the next. Leaving
        the loop, or `close()`, ends the work. For many prompts at once: `stream_rows`.

        Args are those of `generate`, for one prompt: `beginning` is that of its answer. Raises as
        `generate`, at the call and not at the first piece.
        """
        tokenizer = self.processor.tokenizer
        batch, image_tokens = prepare(
            self.model,
            self.processor,
            [image],
            [prompt],
            answers=[beginning] if beginning else None,
            allow_urls=allow_urls,
        )
        return stream(
            self.model,
            tokenizer,
            batch,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            sampler=sampler,
            seed=seed,
            constraint=constraint,
            stop=None if stop is None else StopStrings(tokenizer, stop),
            image_tokens=image_tokens,
            chunk=chunk,
        )

    def generate_by_lookup(
        self,
        images: Sequence[Pictures] | None,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        min_new_tokens: int = 0,
        constraint: Constraint | Sequence[Constraint] | None = None,
        observer: Observer | None = None,
        beginnings: Sequence[str] | None = None,
        guesses: int = GUESSES,
        longest: int = LONGEST,
        kinds: Sequence[tuple[int, int]] = (),
        references: Sequence[Sequence[int]] = (),
        batch_size: int = BATCH_SIZE,
        allow_urls: bool = False,
    ) -> list[LookedUpGeneration]:
        """What `generate` answers with `Greedy`, in fewer passes through the decoder.

        Next tokens are guessed by looking for the last ones in prompt and answer, and checked
        several at once; a wrong guess changes nothing. It pays where answers repeat themselves or
        the prompt (many objects, lines of a table, long names) and reading the weights is what
        takes the time: on accelerators, for few prompts at once. Captions and short answers gain
        nothing. `tokens_a_pass` of an answer tells: on a CPU it pays from about 2 on. For objects:

            kinds = pg.object_kinds(tokenizer)
            pattern = [pg.object_reference(tokenizer, "cat ; dog")]
            pali.generate_by_lookup([image], ["detect cat ; dog"], kinds=kinds, references=pattern)

        Args:
          guesses: tokens that are guessed for a pass.
          longest: how many of the last tokens are looked for at most.
          kinds: ranges of tokens that count as equal when looking, such as `object_kinds`.
          references: tokens for each prompt that are looked through too and not shown to the model:
            answers that this one may resemble, or a pattern, such as `object_reference`.
          images, prompts, max_new_tokens, min_new_tokens, constraint, observer, beginnings,
            batch_size, allow_urls: as for `generate`.

        Raises:
          ConfigError: for a negative number of guesses, or nothing to look for; else as `generate`.
        """
        questions = Questions(images, prompts, beginnings, allow_urls)
        questions.check_each("constraint", constraint)
        if references:
            questions.check_each("references", references)
        tokenizer = self.processor.tokenizer

        def answer(rows: Rows) -> list[LookedUpGeneration]:
            made = generate_by_lookup(
                self.model,
                rows.batch,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                eos_id=tokenizer.eos_id,
                constraint=rows.own_constraint(constraint),
                observer=observer,
                image_tokens=rows.image_tokens,
                guesses=guesses,
                longest=longest,
                kinds=kinds,
                references=rows.own(references) if references else (),
            )
            return [as_looked_up(row, tokenizer) for row in made]

        return questions.answered(self.model, self.processor, batch_size, answer)


def _share(batch_size: int, answers: int) -> int:
    """Prompts at once, so that their answers are `batch_size`; what does not fit stays as it is."""
    return batch_size if min(batch_size, answers) < 1 else max(1, batch_size // answers)


_Found = TypeVar("_Found")
OnePicture = ImageSource | EncodedImages


def find_objects(
    asked: PromptedModel,
    images: Sequence[OnePicture],
    labels: Labels | Sequence[Sequence[str]],
    prompt_of: Callable[[Labels], str],
    grammar_of: Callable[[Tokenizer, Labels], ObjectGrammar],
    read: Callable[[WeighedAnswer, int, int], _Found],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[_Found]:
    """What `read` makes of each answer and of the width and height of its picture.

    Raises InvalidImageError, InvalidPromptError.
    """
    tokenizer = asked.processor.tokenizer
    every_row = prompts.spread_labels(labels, len(images))
    grammars = {row: grammar_of(tokenizer, row) for row in set(every_row)}
    found = []
    for start in range(0, len(images), batch_size):
        pictures = [_one_picture(image) for image in images[start : start + batch_size]]
        rows = every_row[start : start + batch_size]
        same = len(set(rows)) == 1
        answers = asked.generate(
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


def _one_picture(image: OnePicture) -> Image.Image | EncodedImages:
    """With its size; InvalidImageError for several pictures, of which boxes would say nothing."""
    if not isinstance(image, EncodedImages):
        return load_image(image)
    if len(image) != 1:
        raise InvalidImageError(
            f"Boxes are of one picture, and {len(image)} were encoded together. One fits. "
            "Encode each by itself: pali.encode(image)"
        )
    return image


def picture_list(images: Any, input_color_format: str | None) -> list[Any]:
    """One RGB picture an entry.

    numpy arrays are HWC and BGR unless `input_color_format` says otherwise; torch tensors are CHW
    and RGB; "rgb" or "bgr" goes for both. A 4-D array or tensor is a batch. Anything else (paths,
    PIL pictures) passes as it is. Raises InvalidImageError.
    """
    if input_color_format not in (None, "rgb", "bgr"):
        raise InvalidImageError(
            f"input_color_format {input_color_format!r} is unknown. 'rgb', 'bgr' or None fits."
        )
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return [picture for entry in images for picture in picture_list(entry, input_color_format)]
    if type(images).__module__.partition(".")[0] == "torch":
        tensor: Any = images
        array = np.moveaxis(tensor.detach().cpu().numpy(), -3, -1)
        flip = input_color_format == "bgr"
    elif isinstance(images, np.ndarray):
        array, flip = images, input_color_format != "rgb"
    else:
        return [images]
    if flip and array.ndim >= 3 and array.shape[-1] == 3:
        array = np.ascontiguousarray(array[..., ::-1])
    return list(array) if array.ndim == 4 else [array]


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
