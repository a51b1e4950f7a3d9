"""All cases there are."""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from paligemma_jax.benchmark.case import Case, Outcome, Subject
from paligemma_jax.benchmark.floors import Work, decode_work, encode_work, prefill_work
from paligemma_jax.benchmark.implementation import Precision
from paligemma_jax.benchmark.inputs import PROMPT, random_images, random_prompts
from paligemma_jax.benchmark.timing import Effort, Sample, measure
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.generation.answers import MIN_CAPACITY
from paligemma_jax.processing.buckets import MIN_TEXT_LENGTH, bucket

MIXED_PROMPTS, LONGEST_PROMPT = 50, 120


@dataclasses.dataclass(frozen=True)
class EncodeImages(Case):
    """Pictures through the image encoder and its projection."""

    batch: int
    effort: Effort = Effort()

    @property
    def name(self) -> str:
        return f"image encoding, batch {self.batch}"

    @property
    def rows(self) -> int:
        return self.batch

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        return (encode_work(config, self.batch, precision.sizes),)

    def run(self, subject: Subject) -> Outcome:
        call = subject.implementation.encode_images(random_images(subject.config, self.batch))
        _warm(call, subject, self.effort)
        return Outcome(measure([call], self.effort)[0])


@dataclasses.dataclass(frozen=True)
class FirstToken(Case):
    """Pictures and prompts to the first token: image encoder, prefill, argmax."""

    batch: int
    effort: Effort = Effort()

    @property
    def name(self) -> str:
        return f"first token, batch {self.batch}"

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        size = precision.sizes
        return (
            encode_work(config, self.batch, size),
            prefill_work(config, self.batch, PROMPT, size),
        )

    def run(self, subject: Subject) -> Outcome:
        call = subject.implementation.first_token(*random_prompts(subject.config, self.batch))
        _warm(call, subject, self.effort)
        return Outcome(measure([call], self.effort)[0])


@dataclasses.dataclass(frozen=True)
class Decode(Case):
    """One more token a row: the difference of a long and a short answer, by its tokens.

    Both should have the same room in the cache (a power of two), so that they are one program.
    """

    batch: int
    short: int = 33
    long: int = 64
    effort: Effort = Effort()

    @property
    def name(self) -> str:
        return f"decode, batch {self.batch}"

    @property
    def rows(self) -> int:
        return self.batch

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        context = config.img.num_patches + PROMPT + (self.short + self.long) // 2
        return (decode_work(config, self.batch, context, precision.sizes),)

    def run(self, subject: Subject) -> Outcome:
        prompts = random_prompts(subject.config, self.batch)
        calls = [subject.implementation.answer(*prompts, n) for n in (self.short, self.long)]
        _warm(calls[0], subject, self.effort)
        if subject.compiles and room(self.short) != room(self.long):
            calls[1]()
        pairs = zip(*measure(calls, self.effort), strict=True)
        tokens = self.long - self.short
        return Outcome(
            [
                Sample((long.seconds - short.seconds) / tokens, max(long.others, short.others))
                for short, long in pairs
            ]
        )


@dataclasses.dataclass(frozen=True)
class LongAnswer(Case):
    """A token of a long answer against one of a short one, the prompt being read already."""

    short: int = 16
    long: int = 256
    effort: Effort = Effort(1, 3, 10.0)

    @property
    def name(self) -> str:
        return "long answer, batch 1"

    @property
    def rows(self) -> int:
        return 1

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        context = config.img.num_patches + PROMPT + self.long // 2
        return (decode_work(config, 1, context, precision.sizes),)

    def run(self, subject: Subject) -> Outcome:
        prompts = random_prompts(subject.config, 1)
        per_token: list[list[Sample]] = []
        for tokens in (self.short, self.long):
            read, decode = _ours(subject).decoding(*prompts, tokens)
            read()
            decode(2)  # compiles
            calls = [functools.partial(decode, tokens)]
            samples = measure(calls, self.effort, before=read)[0]
            per_token.append([Sample(s.seconds / (tokens - 1), s.others) for s in samples])
        short, long = (statistics.median(s.seconds for s in samples) for samples in per_token)
        return Outcome(per_token[1], {"short_seconds": short, "ratio": long / short})


@dataclasses.dataclass(frozen=True)
class MixedLengths(Case):
    """Prompts of many lengths, one at a time and without pictures: how many programs that takes."""

    @property
    def name(self) -> str:
        return f"{MIXED_PROMPTS} prompts of mixed lengths"

    def run(self, subject: Subject) -> Outcome:
        import jax

        from paligemma_jax.benchmark.compiles import Compilations

        ours = _ours(subject)
        lengths = np.random.default_rng(0).integers(2, LONGEST_PROMPT, MIXED_PROMPTS)
        jax.clear_caches()  # what earlier cases have compiled would not be counted
        counted = Compilations()
        for length in lengths:
            _, tokens = random_prompts(subject.config, 1, int(length))
            ours.answer_text(tokens, new_tokens=2)
        counted.stop()
        buckets = len({bucket(int(n), MIN_TEXT_LENGTH) for n in lengths})
        numbers = {"buckets": buckets, "most_often": max(counted.own.values())}
        return Outcome(numbers=numbers | {f"{name} made": n for name, n in counted.counts.items()})


@dataclasses.dataclass(frozen=True)
class DecodeMemory(Case):
    """Most memory while decoding, against that of weights and cache."""

    tokens: int = 16

    @property
    def name(self) -> str:
        return "memory in decoding, batch 1"

    def run(self, subject: Subject) -> Outcome:
        import jax

        from paligemma_jax.benchmark.memory import peak_during

        ours = _ours(subject)
        read, decode = ours.decoding(*random_prompts(subject.config, 1), self.tokens)
        call = functools.partial(decode, self.tokens)
        read()
        call()
        cache = read()
        kept = {
            "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(ours.model)),
            "cache_bytes": sum(x.nbytes for x in jax.tree.leaves(cache)),
        }
        del cache
        peak = peak_during(call)
        if peak is None:
            return Outcome(numbers=kept)
        peak -= subject.bare_bytes
        return Outcome(numbers=kept | {"peak_bytes": peak, "ratio": peak / sum(kept.values())})


@dataclasses.dataclass(frozen=True)
class Equality(Case):
    """Greedy answers and logits after the prompt, to be compared with the others'."""

    batch: int = 2
    tokens: int = 16

    @property
    def name(self) -> str:
        return "equality"

    def run(self, subject: Subject) -> Outcome:
        prompts = random_prompts(subject.config, self.batch)
        logits = subject.implementation.logits(*prompts)
        answers = subject.implementation.answer(*prompts, self.tokens)()
        return Outcome(arrays={"logits": logits, "tokens": answers})


@dataclasses.dataclass(frozen=True)
class MeasureCeilings(Case):
    """What the machine does at best, just now."""

    small: bool = False

    @property
    def name(self) -> str:
        return "ceilings"

    def run(self, subject: Subject) -> Outcome:
        from paligemma_jax.benchmark.ceilings import measure_ceilings

        return Outcome(numbers=measure_ceilings(self.small))


_CASES: dict[str, Any] = {
    case.__name__: case
    for case in (
        EncodeImages,
        FirstToken,
        Decode,
        LongAnswer,
        MixedLengths,
        DecodeMemory,
        Equality,
        MeasureCeilings,
    )
}


def case_to_dict(case: Case) -> dict[str, Any]:
    """For JSON."""
    return {"case": type(case).__name__, **dataclasses.asdict(cast(Any, case))}


def case_from_dict(values: dict[str, Any]) -> Case:
    """Inverse of `case_to_dict`."""
    fields = {k: v for k, v in values.items() if k != "case"}
    if "effort" in fields:
        fields["effort"] = Effort(**fields["effort"])
    return _CASES[values["case"]](**fields)


def room(tokens: int) -> int:
    """Of an answer, in the cache."""
    return bucket(tokens, MIN_CAPACITY)


def _warm(call: Callable[[], object], subject: Subject, effort: Effort) -> None:
    """Does it once, but not where that takes long and compiles nothing."""
    if subject.compiles or effort.most > 1:
        call()


def _ours(subject: Subject) -> Any:
    from paligemma_jax.benchmark.ours import Ours

    assert isinstance(subject.implementation, Ours), "only this library is asked for this"
    return subject.implementation
