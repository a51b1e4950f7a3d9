"""The cases: what one process measures on one subject, for inference and for training."""

import abc
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.benchmark import Precision, Task
from paligemma_jax.benchmark.measure import (
    BytesPerNumber,
    Effort,
    Sample,
    Work,
    decode_work,
    encode_work,
    measure,
    prefill_work,
    timed,
)
from paligemma_jax.benchmark.subjects import PROMPT, Trainer, random_images, random_prompts
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.layers import on_cpu
from paligemma_jax.processing.processor import MIN_TEXT_LENGTH, bucket


@dataclasses.dataclass(frozen=True)
class Context:
    """What a case runs on.

    Attributes:
      subject: a `Subject`; for `TrainSteps` a `Trainer`.
      compiles: whether the first call takes far longer than the next.
      held_bytes: what the process held before the subject was loaded.
    """

    subject: Any
    config: PaliGemmaConfig
    compiles: bool = True
    held_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Samples (seconds per call, or per token), other numbers, and outputs to compare."""

    samples: Sequence[Sample] = ()
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Case(abc.ABC):
    """One thing to measure.

    Attributes:
      title: its name, with places for its fields; the same for all implementations.
      unit: what one sample yields `units` of: "token", "image", "example", or "" for nothing.
    """

    title = ""
    unit = ""

    @property
    def name(self) -> str:
        """See above."""
        return self.title.format(**vars(self))

    @property
    def units(self) -> int:
        """See above."""
        return getattr(self, "batch", 0) if self.unit else 0

    @property
    def task(self) -> Task:
        """What the subject is loaded for."""
        return Task.INFERENCE

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        """The least work of one sample, part after part; () where nothing is timed."""
        return ()

    @abc.abstractmethod
    def run(self, context: Context) -> Outcome:
        """Measures."""


@dataclasses.dataclass(frozen=True)
class EncodeImages(Case):
    """Images through the image encoder and its projection."""

    batch: int
    effort: Effort = Effort()
    unit = "image"
    title = "image encoding, batch {batch}"

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        return (encode_work(config, self.batch, BytesPerNumber.of(precision)),)

    def run(self, context: Context) -> Outcome:
        call = context.subject.encode_images(random_images(context.config, self.batch))
        return Outcome(_samples(call, context, self.effort))


@dataclasses.dataclass(frozen=True)
class FirstToken(Case):
    """Time to first token: image encoder, prefill, argmax."""

    batch: int
    effort: Effort = Effort()
    title = "time to first token, batch {batch}"

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        sizes = BytesPerNumber.of(precision)
        return (
            encode_work(config, self.batch, sizes),
            prefill_work(config, self.batch, PROMPT, sizes),
        )

    def run(self, context: Context) -> Outcome:
        call = context.subject.first_token(random_prompts(context.config, self.batch))
        return Outcome(_samples(call, context, self.effort))


@dataclasses.dataclass(frozen=True)
class Decode(Case):
    """Decode latency: seconds per token of each sequence, from the first token to the last."""

    batch: int
    tokens: int = 64
    effort: Effort = Effort()
    unit = "token"
    title = "decode, batch {batch}"

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        return (_mean_step(config, self.batch, self.tokens, precision),)

    def run(self, context: Context) -> Outcome:
        prompts = random_prompts(context.config, self.batch)
        call = context.subject.decode(prompts, self.tokens)
        return Outcome([s.per_token(self.tokens) for s in measure([call], self.effort)[0]])


@dataclasses.dataclass(frozen=True)
class LongDecode(Case):
    """Decode latency over many tokens, against that over few."""

    batch: int = 1
    short: int = 16
    long: int = 256
    effort: Effort = Effort(2, 3, 30.0)
    unit = "token"
    title = "long decode, batch {batch}"

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        return (_mean_step(config, self.batch, self.long, precision),)

    def run(self, context: Context) -> Outcome:
        prompts, lengths = random_prompts(context.config, self.batch), (self.short, self.long)
        calls = [context.subject.decode(prompts, n) for n in lengths]
        taken = measure(calls, self.effort)
        short, long = (
            [s.per_token(n) for s in samples] for n, samples in zip(lengths, taken, strict=True)
        )
        medians = [statistics.median(s.seconds for s in samples) for samples in (short, long)]
        return Outcome(long, {"short_seconds": medians[0], "ratio": medians[1] / medians[0]})


MIXED_PROMPTS, LONGEST_PROMPT = 50, 120


@dataclasses.dataclass(frozen=True)
class MixedLengths(Case):
    """Text prompts of many lengths, one at a time: how often that compiles. Ours only."""

    title = f"{MIXED_PROMPTS} prompts of mixed lengths"

    def run(self, context: Context) -> Outcome:
        from paligemma_jax.benchmark.ours import Compilations

        lengths = np.random.default_rng(0).integers(2, LONGEST_PROMPT, MIXED_PROMPTS)
        jax.clear_caches()  # what earlier cases have compiled would not be counted
        with Compilations() as counted:
            for length in lengths:
                _, tokens = random_prompts(context.config, 1, int(length))
                context.subject.generate_text(tokens, new_tokens=2)
        buckets = len({bucket(int(n), MIN_TEXT_LENGTH) for n in lengths})
        numbers = {"buckets": buckets, "most_compilations": max(counted.own.values())}
        for name, count in counted.counts.items():
            numbers[f"{name}_compilations"] = count
        return Outcome(numbers=numbers)


@dataclasses.dataclass(frozen=True)
class DecodeMemory(Case):
    """Peak memory of decoding, against that of weights and cache. Ours only."""

    tokens: int = 16
    title = "decode memory, batch 1"

    def run(self, context: Context) -> Outcome:
        from paligemma_jax.benchmark.ours import peak_during

        ours = context.subject
        prefill, decode = ours.prefill_and_decode(random_prompts(context.config, 1), self.tokens)
        prefill()
        decode(self.tokens)
        cache = prefill()
        kept = {
            "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(ours.model)),
            "cache_bytes": sum(x.nbytes for x in jax.tree.leaves(cache)),
        }
        del cache
        peak = peak_during(functools.partial(decode, self.tokens))
        if peak is None:
            return Outcome(numbers=kept)
        peak -= context.held_bytes
        return Outcome(numbers=kept | {"peak_bytes": peak, "ratio": peak / sum(kept.values())})


@dataclasses.dataclass(frozen=True)
class Outputs(Case):
    """Greedy tokens and logits after the prompt, to compare implementations by."""

    batch: int = 2
    tokens: int = 16
    title = "outputs"

    def run(self, context: Context) -> Outcome:
        prompts = random_prompts(context.config, self.batch)
        logits = context.subject.logits(prompts)
        tokens = context.subject.generate(prompts, self.tokens)()
        return Outcome(outputs={"logits": logits, "tokens": tokens})


@dataclasses.dataclass(frozen=True)
class TrainSteps(Case):
    """Steps on one batch, and the losses of the first ones, to compare implementations by.

    Attributes:
      lora: trains adapters instead of all weights.
      text: tokens that the model reads after an image; the last `suffix` are learned.
      compared: first steps whose losses are compared.
      effort: steps that are timed, after the first one.
    """

    lora: bool
    batch: int
    text: int = 64
    suffix: int = 32
    compared: int = 3
    effort: Effort = Effort(3, 12, 10.0)
    unit = "example"

    @property
    def task(self) -> Task:
        return Task.LORA if self.lora else Task.FULL

    @property
    def name(self) -> str:
        return f"{'LoRA' if self.lora else 'full'} training, batch {self.batch}"

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        """As `paligemma train` counts it for MFU; what is computed twice counts once."""
        from paligemma_jax.training.logging import training_flops

        full = not self.lora
        flops = training_flops(config, self.text, image_trained=full, text_trained=full)
        return (Work(self.batch * flops, 0.0),)

    def run(self, context: Context) -> Outcome:
        trainer: Trainer = context.subject
        start = time.perf_counter()
        losses = [trainer.step()]
        numbers = {"first_step_seconds": time.perf_counter() - start}
        trainer.reset_peak()
        effort = dataclasses.replace(self.effort, fewest=max(self.effort.fewest, self.compared - 1))
        samples = measure([lambda: timed(lambda: losses.append(trainer.step()))], effort)[0]
        numbers["tokens_per_example"] = context.config.img.num_patches + self.text
        return Outcome(samples, numbers, {"losses": np.array(losses[: self.compared])})


@dataclasses.dataclass(frozen=True)
class Start(Case):
    """From nothing to the first token: this library in a fresh process, which does nothing else.

    Attributes:
      warm: whether the programs that a cold start compiled are in the persistent cache.
    """

    warm: bool

    @property
    def name(self) -> str:
        return "warm start" if self.warm else "cold start"

    def run(self, context: Context) -> Outcome:
        context.subject.first_token(random_prompts(context.config, 1))()
        return Outcome()


@dataclasses.dataclass(frozen=True)
class MeasureRoofline(Case):
    """What the machine can do just now: memory bandwidth and matmuls, with JAX. Needs no subject.

    Naive ways mislead on CPUs: a copy into a new array waits for its pages (a sixth of the speed),
    and bfloat16 matmuls with bfloat16 results are upcast first (half of it). So several ways are
    tried in turn, and the best repetition of the best one counts.
    """

    small: bool = False  # measures caches, to try it
    title = "roofline"

    def run(self, context: Context) -> Outcome:
        small = self.small
        size = (1 << 22) if small else (1 << 30) if on_cpu() else (1 << 32)
        widths = (128,) if small else (2048, 4096) if on_cpu() else (8192,)
        seconds = 0.01 if small else 1.2
        numbers = _bandwidths(size, seconds)
        for name in ("float32", "bfloat16"):
            numbers[name] = max(_matmul_flops(jnp.dtype(name), n, seconds / 2) for n in widths)
        return Outcome(numbers=numbers)


def _mean_step(config: PaliGemmaConfig, batch: int, tokens: int, precision: Precision) -> Work:
    """The decoding step in the middle of so many tokens."""
    context = config.img.num_patches + PROMPT + tokens // 2
    return decode_work(config, batch, context, BytesPerNumber.of(precision))


def _samples(call: Callable[[], object], context: Context, effort: Effort) -> list[Sample]:
    """After one call to warm up, but not where a single long call compiles nothing."""
    if context.compiles or effort.most > 1:
        call()
    return measure([functools.partial(timed, call)], effort)[0]


_COLUMNS = 8192  # of the matrix that is read: rows of 32 KiB gave CPUs their best


def _bandwidths(size: int, seconds: float) -> dict[str, float]:
    """`read` and `copy`, in bytes/s; a copy counts what is read and what is written."""
    matrix = jnp.ones((size // 4 // _COLUMNS, _COLUMNS), jnp.float32)
    vector = jnp.ones(_COLUMNS, jnp.float32)
    ways = [jax.jit(jnp.sum), jax.jit(lambda m: m.sum(1)), jax.jit(lambda m: m @ vector)]
    read = size / _best([lambda way=way: way(matrix) for way in ways], seconds)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no new pages

    def copy() -> jax.Array:
        nonlocal matrix
        matrix = add(matrix)
        return matrix

    return {"read": read, "copy": 2 * size / _best([copy], seconds)}


def _matmul_flops(dtype: jnp.dtype, width: int, seconds: float) -> float:
    matmul = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    one = jnp.full((width, width), 0.01, dtype)
    return 2 * width**3 / _best([lambda: matmul(one, one)], seconds)


def _best(calls: Sequence[Callable[[], jax.Array]], seconds: float) -> float:
    """Least seconds of any call; they are tried in turn for so long."""
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
