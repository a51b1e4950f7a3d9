"""The object most people touch: a checkpoint with its processor, and a method for each task."""

import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import (
    CheckpointError,
    InvalidImageError,
    InvalidPromptError,
    UnexpectedAnswerError,
)
from paligemma_jax.generation import beam_search as beams
from paligemma_jax.generation import generate as decoding
from paligemma_jax.generation import prompt_lookup as lookup
from paligemma_jax.generation import streaming
from paligemma_jax.generation.config import (
    GenerationConfig,
    common_length,
    resolve_config,
    to_hugging_face,
)
from paligemma_jax.generation.detection_grammar import (
    MAX_OBJECTS,
    ObjectGrammar,
    detection_grammar,
    segmentation_grammar,
)
from paligemma_jax.generation.image_embeddings import (
    BATCH_SIZE,
    EncodedImages,
    PromptBatch,
    encode,
    prompt_batches,
)
from paligemma_jax.generation.results import Generation, GenerationEvent
from paligemma_jax.generation.scoring import Classification, ScoredAnswer, classify, score
from paligemma_jax.generation.token_statistics import LocationStatistics
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization import quantization_of
from paligemma_jax.processing import prompts as templates
from paligemma_jax.processing.box_scores import AnswerLogprobs, parse_logprobs
from paligemma_jax.processing.detections import Detections, Segmentations
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.processor import Entry, Processor, images_of
from paligemma_jax.processing.prompts import Labels, check_labels, parse_number
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.weights.convert import export_weights
from paligemma_jax.weights.formats import CheckpointFormat, CheckpointMetadata
from paligemma_jax.weights.mask_vae import mask_vae_bytes
from paligemma_jax.weights.tensors import DTypeLike, Progress
from paligemma_jax.weights.views import model_weights

MAX_OBJECT_TOKENS = 512  # room for 20 masks or 60 boxes; a sequence ends when it is complete
Images = Entry | EncodedImages  # of one prompt
OneImage = ImageSource | EncodedImages
_ALSO = ("answer_prefixes", "batch_size", "allow_urls")
_T = TypeVar("_T")
_Found = TypeVar("_Found", Detections, Segmentations)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model ready to use; made by `from_pretrained`.

    An image is a path, PIL image, HWC array (RGB), or the bytes of a file; see `load_image`. Where
    several prompts are about it, `encode` it first and give what comes back instead. Prompts of
    your own: `generate`, `best_of`, `beam_search`, `stream`, `prompt_lookup_generate`. What is
    generated for a prompt does not depend on what else is asked for at the same time.

    Attributes:
      model, processor, mask_codec: the parts of the checkpoint.
      generation_config: the defaults of all methods, from the checkpoint's generation_config.json;
        for others: dataclasses.replace(pali, generation_config=...).
    """

    model: PaliGemma
    processor: Processor
    mask_codec: MaskCodec | None = None
    generation_config: GenerationConfig = GenerationConfig()

    def __repr__(self) -> str:
        config = self.config
        size, depth, width = config.img.image_size, config.llm.depth, config.llm.width
        codec = "with" if self.mask_codec is not None else "without"
        return (
            f"Pipeline({size} x {size} pixels, {depth} decoder layers of width {width}, "
            f"{self.model.dtype}, {codec} mask codec)"
        )

    @property
    def config(self) -> PaliGemmaConfig:
        """The model's architecture."""
        return self.model.config

    def encode(self, images: Entry) -> EncodedImages:
        """An image, or the several of one prompt, through the image encoder once, for all methods.

        Raises InvalidImageError. `paligemma_jax.generation.image_embeddings` says what is shared.
        """
        return encode(self.model, self.processor.image, images)

    def caption(self, image: Images, language: str = "en") -> str:
        """A short description; raises InvalidImageError, InvalidPromptError."""
        return self._ask(image, templates.caption(language))

    def answer(self, image: Images, question: str, language: str = "en") -> str:
        """A short answer about one image or several; raises as `caption`."""
        return self._ask(image, templates.answer(question, language))

    def ocr(self, image: Images) -> str:
        """The text in the image."""
        return self._ask(image, templates.ocr())

    def count(self, image: Images, thing: str) -> int:
        """How many there are of `thing` (in the plural).

        Raises UnexpectedAnswerError if the model answers with something else than a number.
        """
        text = self._ask(image, templates.count(thing))
        number = parse_number(text)
        if number is None:
            raise UnexpectedAnswerError(
                f"expected a number of {thing}, got {text!r}. Ask in words with answer()."
            )
        return number

    def detect(self, image: OneImage, labels: Labels) -> Detections:
        """Boxes with scores of one class of objects, or of several; raises as `caption`.

        `labels` is a list, or "cat ; dog". The answer is well-formed and has no other labels (see
        `detection_grammar`); for what the model says freely: generate([image], ["detect cat"]).
        """
        return self.detect_batch([image], labels)[0]

    def detect_batch(
        self,
        images: Sequence[OneImage],
        labels: Labels | Sequence[Sequence[str]],
        *,
        max_objects: int = MAX_OBJECTS,
        max_new_tokens: int = MAX_OBJECT_TOKENS,
        batch_size: int = BATCH_SIZE,
    ) -> list[Detections]:
        """`detect` for many images; `labels` are those of every image, or one list each."""

        def read(answer: AnswerLogprobs, width: int, height: int) -> Detections:
            return Detections.from_answer(answer.answer, width, height, answer.scores())

        grammar = functools.partial(detection_grammar, max_objects=max_objects)
        prompt = templates.detect
        return self._objects(images, labels, prompt, grammar, read, max_new_tokens, batch_size)

    def segment(self, image: OneImage, labels: Labels) -> Segmentations:
        """Boxes, scores and masks; `labels` as for `detect`.

        Raises CheckpointError without a mask codec, else as `caption`.
        """
        return self.segment_batch([image], labels)[0]

    def segment_batch(
        self,
        images: Sequence[OneImage],
        labels: Labels | Sequence[Sequence[str]],
        *,
        max_objects: int = MAX_OBJECTS,
        max_new_tokens: int = MAX_OBJECT_TOKENS,
        batch_size: int = BATCH_SIZE,
    ) -> list[Segmentations]:
        """`segment` for many images; `labels` are those of every image, or one list each."""
        codec = self.mask_codec
        if codec is None:
            raise CheckpointError(
                "expected a mask codec, which turns <seg> tokens into masks, beside the weights: "
                "vae-oid.npz is that of every PaliGemma. Put it there, or load with "
                "from_pretrained(..., mask_codec='vae-oid.npz') (--mask-codec vae-oid.npz)."
            )

        def read(answer: AnswerLogprobs, width: int, height: int) -> Segmentations:
            scores = answer.scores()
            return Segmentations.decode(answer.answer, width, height, codec.decode, scores)

        grammar = functools.partial(segmentation_grammar, max_objects=max_objects)
        prompt = templates.segment
        return self._objects(images, labels, prompt, grammar, read, max_new_tokens, batch_size)

    def score(self, image: Images, prompt: str, candidates: Sequence[str]) -> list[ScoredAnswer]:
        """How likely (log-probability, nats) each of the given answers is, in the order given.

        Image and prompt are read once for all candidates. Raises as `caption`.
        """
        return self.score_batch([image], [prompt], [candidates])[0]

    def score_batch(
        self,
        images: Sequence[Images] | None,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        *,
        batch_size: int = BATCH_SIZE,
    ) -> list[list[ScoredAnswer]]:
        """`score` for many prompts, each with its own images and candidates."""
        return score(self.model, self.processor, images, prompts, candidates, batch_size=batch_size)

    def classify(
        self,
        image: Images,
        labels: Sequence[str],
        question: str = "what is in the image?",
        language: str = "en",
    ) -> Classification:
        """Which of the labels answers the question best, with a probability for each.

        Raises InvalidPromptError for labels that are empty or come twice, else as `caption`.
        """
        check_labels(labels)
        return classify(self.score(image, templates.answer(question, language), labels))

    def generate(
        self,
        images: Sequence[Images] | None,
        prompts: Sequence[str],
        *,
        config: GenerationConfig | None = None,
        answer_prefixes: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
        allow_urls: bool = False,
        **settings: Any,
    ) -> list[Generation]:
        """Generates an answer to each of many prompts about its own images.

            pali.generate([image], ["caption en"], temperature=0.7, top_p=0.9, max_new_tokens=64)

        Args:
          images: for each prompt an image, a list of images (or video frames), what `encode` made
            of them, or None; None instead of the list for prompts without images.
          prompts: the text, as the checkpoint was trained on it.
          config: how to decode; `generation_config` if not given.
          answer_prefixes: text that each answer continues, one per prompt; "" for none. The
            model takes one for its own words, so the prompt does not see it. It had better end
            where a word ends, without the space after it. The generation is what comes then, and
            limits count that.
          batch_size: prompts that go through the model together.
          allow_urls: whether an image may be an http(s) address.
          **settings: fields of `GenerationConfig`, over those of `config`: temperature, top_k,
            top_p, min_p, max_new_tokens, min_new_tokens, stop, seed, sampler, constraint, ...; many
            also as a list with a value for each prompt.

        Raises:
          InvalidImageError, InvalidPromptError: naming the entry.
          ConfigError: for settings that are unknown, out of their range, or that no answer could
            keep; before anything is computed.
        """
        run = functools.partial(self._run, decoding.generate)
        how = (answer_prefixes, batch_size, allow_urls)
        return self._generate("generate", run, images, prompts, config, settings, how)

    def best_of(
        self,
        images: Sequence[Images] | None,
        prompts: Sequence[str],
        *,
        n: int,
        config: GenerationConfig | None = None,
        answer_prefixes: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
        allow_urls: bool = False,
        **settings: Any,
    ) -> list[list[Generation]]:
        """`n` samples for each prompt, the highest score first; image and prompt are read once.

        The first one sampled is that of `generate` with the same settings; the temperature is 1 by
        default. The score is logprob / tokens ** length_penalty, `Generation.score`.

        Args:
          n: samples for each prompt; equal ones are not removed.
          batch_size: samples, not prompts, that are drawn together; all those of one prompt are.
          images, prompts, config, answer_prefixes, allow_urls, **settings: as for `generate`.

        Raises:
          ConfigError: for less than one sample, several without sampling, and as `generate`.
        """
        config = decoding.best_of_config(n, config or self.generation_config, settings)
        run = functools.partial(self._run, decoding.best_of, n=n)
        how = (answer_prefixes, _share(batch_size, n), allow_urls)
        return self._generate("best_of", run, images, prompts, config, {}, how)

    def beam_search(
        self,
        images: Sequence[Images] | None,
        prompts: Sequence[str],
        *,
        config: GenerationConfig | None = None,
        answer_prefixes: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
        allow_urls: bool = False,
        **settings: Any,
    ) -> list[list[Generation]]:
        """The most probable answers that a search of limited width finds, highest score first.

        Settings are `num_beams`, `length_penalty`, `early_stopping` (True: big_vision's rule,
        False: Hugging Face's), `num_return_sequences`, the limits and `constraint`. None is
        returned for a prompt if no answer of `max_new_tokens` satisfies the constraint and ends.

        Args:
          batch_size: beams, not prompts, that go through the model together; all of one prompt do.
          images, prompts, config, answer_prefixes, allow_urls, **settings: as for `generate`.

        Raises:
          ConfigError: for more beams than tokens to choose from; else as `generate`.
        """
        base = config or self.generation_config
        config = resolve_config("beam_search", base, settings, also=_ALSO)
        run = functools.partial(self._run, beams.beam_search)
        at_once = _share(batch_size, config.num_beams or beams.NUM_BEAMS)
        how = (answer_prefixes, at_once, allow_urls)
        return self._generate("beam_search", run, images, prompts, config, {}, how)

    def prompt_lookup_generate(
        self,
        images: Sequence[Images] | None,
        prompts: Sequence[str],
        *,
        draft_tokens: int = lookup.DRAFT_TOKENS,
        max_ngram_size: int = lookup.MAX_NGRAM_SIZE,
        token_classes: lookup.TokenClasses = (),
        draft_corpus: Sequence[Sequence[int]] = (),
        config: GenerationConfig | None = None,
        answer_prefixes: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
        allow_urls: bool = False,
        **settings: Any,
    ) -> list[Generation]:
        """What `generate` returns greedily, in fewer passes through the decoder.

        Next tokens are drafted by looking for the last ones in prompt and answer, and checked
        several at once; a wrong draft changes nothing. It pays where answers repeat themselves or
        the prompt (many objects, lines of a table, long names) and reading the weights is what
        takes the time: on accelerators, for few prompts at once. Captions and short answers gain
        nothing. `Generation.tokens_per_forward_pass` tells: on a CPU it pays from about 2 on. For
        objects:

            classes = pg.object_token_classes(tokenizer)
            corpus = [pg.object_draft_corpus(tokenizer, "cat ; dog")]
            pali.prompt_lookup_generate(
                [image], ["detect cat ; dog"], token_classes=classes, draft_corpus=corpus
            )

        Args and errors are those of `generate`, without sampling, and of the function of the same
        name: draft_tokens, max_ngram_size, token_classes, and draft_corpus with tokens for each
        prompt.
        """
        drafting = dict(
            draft_tokens=draft_tokens, max_ngram_size=max_ngram_size, token_classes=token_classes
        )
        if draft_corpus and len(draft_corpus) != len(prompts):
            raise InvalidPromptError(
                f"draft_corpus: expected a list of tokens for each of {len(prompts)} prompts, got "
                f"{len(draft_corpus)}. Pass [] for a prompt without."
            )

        def run(chosen: PromptBatch, config: GenerationConfig) -> list[Generation]:
            own = [draft_corpus[i] for i in chosen.indices] if draft_corpus else ()
            function = lookup.prompt_lookup_generate
            return self._run(function, chosen, config, draft_corpus=own, **drafting)

        how = (answer_prefixes, batch_size, allow_urls)
        return self._generate("prompt_lookup_generate", run, images, prompts, config, settings, how)

    def stream(
        self,
        image: Images,
        prompt: str,
        *,
        config: GenerationConfig | None = None,
        answer_prefix: str = "",
        chunk: int = streaming.CHUNK,
        allow_urls: bool = False,
        **settings: Any,
    ) -> Generator[GenerationEvent, None, None]:
        """The answer to one prompt as events, while it is generated.

            for event in pali.stream(image, "caption en"):
                print(event, end="", flush=True)

        Their texts, joined, are that of `generate`; the last one has the `finish_reason` and the
        whole `generation`. An event comes every `chunk` tokens, and its text never ends inside a
        character; while the caller holds one, the device works on the next. Leaving the loop, or
        `close()`, ends the work. Args are those of `generate`, for one prompt. Raises as
        `generate`, at the call and not at the first event.
        """
        config = config or self.generation_config
        config = resolve_config("stream", config, settings, also=("chunk", "answer_prefix"))
        prefixes = [answer_prefix] if answer_prefix else None
        how: dict[str, Any] = dict(answer_prefixes=prefixes, allow_urls=allow_urls)
        (only,) = prompt_batches(self.model, self.processor, [image], [prompt], **how)
        return self._run(streaming.stream, only, config, chunk=chunk)

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
        """One prompt about each of several images: the signature of Roboflow's `AutoModel`.

        numpy arrays are BGR, as OpenCV reads them, unless `input_color_format` is "rgb"; torch
        tensors are CHW and RGB. A list, or a 4-D array, is a batch of separate images.
        """
        listed = image_list(images, input_color_format)
        found = self.generate(
            listed,
            [prompt] * len(listed),
            max_new_tokens=max_new_tokens,
            temperature=1.0 if do_sample else 0.0,
            seed=seed,
        )
        show_eos = not skip_special_tokens
        return [g.text + "<eos>" * (show_eos and g.finish_reason == "eos") for g in found]

    def save(
        self,
        path: str | os.PathLike[str],
        format: str | CheckpointFormat = "orbax",
        *,
        dtype: DTypeLike = None,
        verify: bool = False,
        origin: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Writes a directory that `from_pretrained` reads; never replaces one.

        Adapters are merged, and quantized weights are stored as they are. Peak memory beyond the
        model's is that of some layers.

        Args:
          path: which does not exist yet.
          format: "orbax" (this library's, which keeps everything), "huggingface" (what transformers
            reads, too), "big_vision" (an npz where `path` ends in .npz, else a directory with one).
          dtype: of the floats written; the model's own otherwise.
          verify: reads what was written again, and compares it with the model.
          origin: what an orbax checkpoint should tell of where the weights are from.
          progress: called with what is being written, bytes done and bytes in all.

        Raises CheckpointError where it cannot be written, and for a quantized model in a format
        that has room for floats only.
        """
        generation = to_hugging_face(self.generation_config)
        metadata = CheckpointMetadata(
            self.processor.to_dict(),
            self.processor.tokenizer.to_bytes(),
            None if self.mask_codec is None else mask_vae_bytes(self.mask_codec.model),
            origin={**(origin or {}), **({"generation_config": generation} if generation else {})},
            quantization=quantization_of(self.model),
        )
        export_weights(
            path,
            model_weights(self.model),
            metadata,
            format,
            dtype=dtype,
            verify=verify,
            progress=progress,
        )

    def _ask(self, image: Images, prompt: str) -> str:
        return self.generate([image], [prompt])[0].text

    def _objects(
        self,
        images: Sequence[OneImage],
        labels: Labels | Sequence[Sequence[str]],
        prompt_of: Callable[[Labels], str],
        grammar_of: Callable[[Tokenizer, Labels], ObjectGrammar],
        read: Callable[[AnswerLogprobs, int, int], _Found],
        max_new_tokens: int,
        batch_size: int,
    ) -> list[_Found]:
        """What `read` makes of each answer and of the width and height of its image."""
        for image in images:
            count = len(image if isinstance(image, EncodedImages) else images_of(image))
            if count != 1:
                raise InvalidImageError(f"expected one image for the boxes to be in, got {count}.")
        tokenizer = self.processor.tokenizer
        spread = templates.spread_labels(labels, len(images))
        grammars = {own: grammar_of(tokenizer, own) for own in set(spread)}
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": tokenizer.eos_id,
            "token_statistics": LocationStatistics(tokenizer.loc_start),
        }
        if len(grammars) > 1:
            settings["constraint"] = [grammars[own] for own in spread]
        elif grammars:
            (settings["constraint"],) = grammars.values()

        def run(chosen: PromptBatch, config: GenerationConfig) -> Iterator[_Found]:
            generations = self._run(decoding.generate, chosen, config)
            for g, sizes in zip(generations, chosen.sizes, strict=True):
                answer = parse_logprobs(g.tokens, g.logprobs, tokenizer, g.extras)
                yield read(answer, *sizes[0])

        prompts = [prompt_of(own) for own in spread]
        how = (None, batch_size, False)
        return self._generate("generate", run, images, prompts, None, settings, how)

    def _run(
        self,
        function: Callable[..., _T],
        chosen: PromptBatch,
        config: GenerationConfig,
        **more: Any,
    ) -> _T:
        """One of the functions of `generation` on a batch."""
        return function(
            self.model,
            chosen.batch,
            self.processor.tokenizer,
            config=config,
            image_tokens=chosen.image_tokens,
            **more,
        )

    def _generate(
        self,
        method: str,
        run: Callable[[PromptBatch, GenerationConfig], Iterable[_T]],
        images: Sequence[Images] | None,
        prompts: Sequence[str],
        config: GenerationConfig | None,
        settings: Mapping[str, Any],
        how: tuple[Sequence[str] | None, int, bool],
    ) -> list[_T]:
        """What `run` makes of every prompt, in order, a batch at a time.

        `how` are answer_prefixes, batch_size and allow_urls.
        """
        config = resolve_config(method, config or self.generation_config, settings, also=_ALSO)
        if not isinstance(prompts, str):
            common_length(vars(config), len(prompts))
        names: dict[str, Any] = dict(zip(_ALSO, how, strict=True))
        results: dict[int, _T] = {}
        for chosen in prompt_batches(self.model, self.processor, images, prompts, **names):
            made = run(chosen, config.select(chosen.indices, len(prompts)))
            results.update(zip(chosen.indices, made, strict=True))
        return [results[i] for i in range(len(prompts))]


def _share(batch_size: Any, sequences: int) -> Any:
    """Prompts at once, so that their sequences are `batch_size`; what is wrong stays as it is."""
    valid = isinstance(batch_size, int) and batch_size >= 1
    return max(1, batch_size // sequences) if valid else batch_size


def image_list(images: Any, input_color_format: str | None) -> list[Any]:
    """One RGB image an entry.

    numpy arrays are HWC and BGR unless `input_color_format` says otherwise; torch tensors are CHW
    and RGB; "rgb" or "bgr" goes for both. A 4-D array or tensor is a batch. Anything else (paths,
    PIL images) passes as it is. Raises InvalidImageError.
    """
    if input_color_format not in (None, "rgb", "bgr"):
        raise InvalidImageError(
            f"input_color_format: expected 'rgb', 'bgr' or None, got {input_color_format!r}."
        )
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return [image for entry in images for image in image_list(entry, input_color_format)]
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
