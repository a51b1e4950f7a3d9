"""A model with its processor, and every way to have it answer a prompt of the user's own."""

import dataclasses
from collections.abc import Generator, Sequence

from paligemma_jax.answering.generation import (
    BeamGeneration,
    Generation,
    LookedUpGeneration,
    as_beam_generation,
    as_generation,
    as_looked_up,
)
from paligemma_jax.answering.questions import Pictures, Questions, Rows
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.generation.beam import beam_search
from paligemma_jax.generation.best_samples import best_of
from paligemma_jax.generation.constraint import Constraint
from paligemma_jax.generation.encoded import EncodedImages, encode, prepare
from paligemma_jax.generation.ending import EndAnytime, Ending
from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.lookup import GUESSES, LONGEST, generate_by_lookup
from paligemma_jax.generation.observer import Observer
from paligemma_jax.generation.sampling import Greedy, Sampler, Temperature
from paligemma_jax.generation.stopping import StopStrings
from paligemma_jax.generation.streaming import CHUNK, stream
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Entry, Processor

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

        Raises InvalidImageError. See `paligemma_jax.generation.encoded` for what can be shared.
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
