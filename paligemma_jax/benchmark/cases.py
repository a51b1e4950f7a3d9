"""All cases there are.

What a case is: something to measure on any implementation.

What this machine does at best, measured with JAX: memory bandwidth and matrix products.

The naive ways mislead on CPUs: a copy into a fresh array waits for the pages to be made (a sixth of
the speed), and bfloat16 products with bfloat16 results are widened first (half of it). So several
ways are tried in turn, and the best repetition of the best one counts.
"""

import abc
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.benchmark.subjects import (
    PROMPT,
    Effort,
    Implementation,
    Precision,
    Sample,
    Work,
    decode_work,
    encode_work,
    measure,
    prefill_work,
    random_images,
    random_prompts,
    sample,
)
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.layers import on_cpu
from paligemma_jax.processing.processor import MIN_TEXT_LENGTH, bucket


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a case runs on: a loaded implementation, and what the process held without it.

    `compiles` is whether the first call of something takes far longer than the next.
    """

    implementation: Implementation
    config: PaliGemmaConfig
    compiles: bool = True
    bare_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Samples (seconds for one call, or for one token a row), other numbers, arrays to compare."""

    samples: list[Sample] = dataclasses.field(default_factory=list)
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Case(abc.ABC):
    """One thing to measure."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The same for all implementations."""

    @property
    def rows(self) -> int:
        """Pictures, or tokens, that one sample yields; 0 where that says nothing."""
        return 0

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        """What one sample must do at least, one part after the other; () where nothing is timed."""
        return ()

    @abc.abstractmethod
    def run(self, subject: Subject) -> Outcome:
        """Measures."""


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
        return Outcome(_samples(call, subject, self.effort))


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
        return Outcome(_samples(call, subject, self.effort))


@dataclasses.dataclass(frozen=True)
class Decode(Case):
    """One more token a row, on the way from an answer's first token to its last."""

    batch: int
    tokens: int = 64
    effort: Effort = Effort()

    @property
    def name(self) -> str:
        return f"decode, batch {self.batch}"

    @property
    def rows(self) -> int:
        return self.batch

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        return (_one_more(config, self.batch, self.tokens, precision),)

    def run(self, subject: Subject) -> Outcome:
        prompts = random_prompts(subject.config, self.batch)
        call = subject.implementation.decoding(*prompts, self.tokens)
        return Outcome([s.a_token(self.tokens) for s in measure([call], self.effort)[0]])


@dataclasses.dataclass(frozen=True)
class LongAnswer(Case):
    """A token of a long answer against one of a short one."""

    short: int = 16
    long: int = 256
    effort: Effort = Effort(2, 3, 30.0)

    @property
    def name(self) -> str:
        return "long answer, batch 1"

    @property
    def rows(self) -> int:
        return 1

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        return (_one_more(config, 1, self.long, precision),)

    def run(self, subject: Subject) -> Outcome:
        prompts = random_prompts(subject.config, 1)
        numbers = self.short, self.long
        calls = [subject.implementation.decoding(*prompts, n) for n in numbers]
        taken = measure(calls, self.effort)
        short, long = (
            [s.a_token(n) for s in samples] for n, samples in zip(numbers, taken, strict=True)
        )
        medians = [statistics.median(s.seconds for s in samples) for samples in (short, long)]
        return Outcome(long, {"short_seconds": medians[0], "ratio": medians[1] / medians[0]})


@dataclasses.dataclass(frozen=True)
class MixedLengths(Case):
    """Prompts of many lengths, one at a time and without pictures: how many programs that takes."""

    @property
    def name(self) -> str:
        return f"{MIXED_PROMPTS} prompts of mixed lengths"

    def run(self, subject: Subject) -> Outcome:
        import jax

        from paligemma_jax.benchmark.ours import Compilations

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

        from paligemma_jax.benchmark.ours import peak_during

        ours = _ours(subject)
        read, decode = ours.reading_and_decoding(*random_prompts(subject.config, 1), self.tokens)
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


def _one_more(config: PaliGemmaConfig, batch: int, tokens: int, precision: Precision) -> Work:
    """What a step in the middle of such an answer must do at least."""
    context = config.img.num_patches + PROMPT + tokens // 2
    return decode_work(config, batch, context, precision.sizes)


def _samples(call: Callable[[], object], subject: Subject, effort: Effort) -> list[Sample]:
    """Of a call that is done once before, but not where that takes long and compiles nothing."""
    if subject.compiles or effort.most > 1:
        call()
    return measure([functools.partial(sample, call)], effort)[0]


def _ours(subject: Subject) -> Any:
    from paligemma_jax.benchmark.ours import Ours

    assert isinstance(subject.implementation, Ours), "only this library is asked for this"
    return subject.implementation


COLUMNS = 8192  # of the matrix that is read: rows of 32 KiB gave CPUs their best


def measure_ceilings(small: bool = False) -> dict[str, float]:
    """`read`, `copy` (bytes/s; read and written ones), `float32`, `bfloat16` (operations/s).

    `small` is for trying: it measures caches.
    """
    size = (1 << 22) if small else (1 << 30) if on_cpu() else (1 << 32)
    widths = (128,) if small else (2048, 4096) if on_cpu() else (8192,)
    seconds = 0.01 if small else 1.2
    numbers = _bandwidths(size, seconds)
    for name in ("float32", "bfloat16"):
        numbers[name] = max(_rate(jnp.dtype(name), width, seconds / 2) for width in widths)
    return numbers


def _bandwidths(size: int, seconds: float) -> dict[str, float]:
    matrix = jnp.ones((size // 4 // COLUMNS, COLUMNS), jnp.float32)
    vector = jnp.ones(COLUMNS, jnp.float32)
    ways = [jax.jit(jnp.sum), jax.jit(lambda m: m.sum(1)), jax.jit(lambda m: m @ vector)]
    read = size / _best([lambda way=way: way(matrix) for way in ways], seconds)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no fresh pages

    def copy() -> jax.Array:
        nonlocal matrix
        matrix = add(matrix)
        return matrix

    return {"read": read, "copy": 2 * size / _best([copy], seconds)}


def _rate(dtype: jnp.dtype, width: int, seconds: float) -> float:
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    one = jnp.full((width, width), 0.01, dtype)
    return 2 * width**3 / _best([lambda: product(one, one)], seconds)


def _best(calls: Sequence[Callable[[], jax.Array]], seconds: float) -> float:
    """Least seconds of any call, tried in turn for so long."""
    for call in calls:
        jax.block_until_ready(call())
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 * len(calls) or time.perf_counter() < end:
        for call in calls:
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
    return min(times)
