"""How it is measured: timed calls, noise from other processes, memory, and the roofline."""

import ctypes
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from paligemma_jax.benchmark import Precision
from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig


@dataclasses.dataclass(frozen=True)
class Sample:
    """One timed call: wall-clock seconds, and the fraction of all CPUs that others kept busy."""

    seconds: float
    other_cpu: float

    def per_token(self, tokens: int) -> "Sample":
        """Of each token after the first one, which was there when the clock started."""
        return dataclasses.replace(self, seconds=self.seconds / (tokens - 1))


@dataclasses.dataclass(frozen=True)
class Effort:
    """At least `fewest` samples, then more until there are `most` or `seconds` have passed."""

    fewest: int = 3
    most: int = 20
    seconds: float = 3.0


class Stopwatch:
    """Runs from its construction on."""

    def __init__(self) -> None:
        self._cpu = _cpu_seconds()
        self._start = time.perf_counter()

    def stop(self) -> Sample:
        """The time since then."""
        seconds = time.perf_counter() - self._start
        (total, busy, own), (total0, busy0, own0) = _cpu_seconds(), self._cpu
        if total <= total0:  # too short, or the system does not tell
            return Sample(seconds, 0.0)
        other = max(0.0, (busy - busy0) - (own - own0)) / (total - total0)
        return Sample(seconds, other)


def _cpu_seconds() -> tuple[float, float, float]:
    """CPU time of the machine, the busy part of it, and that of this process."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0, 0.0, 0.0
    tick, own = os.sysconf("SC_CLK_TCK"), os.times()
    idle = fields[3] + fields[4]
    return sum(fields) / tick, (sum(fields) - idle) / tick, own.user + own.system


def timed(call: Callable[[], object]) -> Sample:
    """Times one call."""
    watch = Stopwatch()
    call()
    return watch.stop()


def measure(calls: Sequence[Callable[[], Sample]], effort: Effort) -> list[list[Sample]]:
    """Samples of each call, taken in turn so that all see the same machine; calls must be warm."""
    taken: list[list[Sample]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(taken[0]) < effort.fewest or (
        len(taken[0]) < effort.most and time.perf_counter() - start < effort.seconds
    ):
        for call, samples in zip(calls, taken, strict=True):
            samples.append(call())
    return taken


def peak_resident() -> int:
    """Peak resident bytes of this process, without asking any library for its devices."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):  # ru_maxrss may be the parent process's
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def reset_peak_resident() -> bool:
    """Restarts `peak_resident`, freed memory returned first; False where the system cannot."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes moved to and from memory.

    A multiply-add counts as 2 operations. Bytes are those that must be moved once: weights, keys
    and values. Attention counts in full, since the prefix of a prefix-LM sees all of itself. Norms,
    activations and soft caps are left out: they are below 0.1 %.
    """

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class BytesPerNumber:
    """In the decoder's linear layers, in its embedding table, and anywhere else."""

    linear: float
    embedding: float
    other: float

    @classmethod
    def of(cls, precision: Precision) -> "BytesPerNumber":
        """The scales of quantized weights are left out."""
        match precision:
            case Precision.FLOAT32:
                return cls(4.0, 4.0, 4.0)
            case Precision.BFLOAT16:
                return cls(2.0, 2.0, 2.0)
            case Precision.INT4:
                return cls(linear=0.5, embedding=1.0, other=2.0)
        return cls(linear=1.0, embedding=1.0, other=2.0)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What a machine can do: bytes/s, and operations/s in one precision."""

    bandwidth: float
    flops: float

    def seconds(self, *parts: Work) -> float:
        """Least time for parts that follow one another, each bound by memory or by arithmetic."""
        return sum(max(p.flops / self.flops, p.bytes / self.bandwidth) for p in parts)


def encode_work(config: PaliGemmaConfig, images: int, sizes: BytesPerNumber) -> Work:
    """The image encoder and its projection."""
    width = config.llm.width
    weights = _encoder_weights(config.img, width) * sizes.other
    return Work(images * _encoder_flops(config.img, width), weights)


def prefill_work(config: PaliGemmaConfig, batch: int, text: int, sizes: BytesPerNumber) -> Work:
    """The decoder over one image and `text` tokens per sequence, with logits at the last one."""
    llm, length = config.llm, config.img.num_patches + text
    attention = llm.depth * 4 * length**2 * llm.num_heads * llm.head_dim
    flops = 2 * length * _linear_weights(llm) + attention + 2 * llm.vocab_size * llm.width
    written = batch * length * cache_values(llm) * sizes.other
    return Work(batch * flops, _decoder_bytes(llm, sizes) + written)


def decode_work(config: PaliGemmaConfig, batch: int, context: int, sizes: BytesPerNumber) -> Work:
    """One more token per sequence, after `context` tokens of image and text."""
    llm = config.llm
    attention = llm.depth * 4 * context * llm.num_heads * llm.head_dim
    flops = 2 * (_linear_weights(llm) + llm.vocab_size * llm.width) + attention
    cache = batch * (context + 1) * cache_values(llm) * sizes.other
    return Work(batch * flops, _decoder_bytes(llm, sizes) + cache)


def cache_values(llm: GemmaConfig) -> int:
    """Numbers that one token adds to the KV cache."""
    return 2 * llm.depth * llm.num_kv_heads * llm.head_dim


def _encoder_flops(img: SigLIPConfig, width: int) -> float:
    n, d = img.num_patches, img.width
    layer = 4 * 2 * n * d * d + 2 * 2 * n * d * img.mlp_dim + 2 * 2 * n * n * d
    patches = 2 * n * 3 * img.patch_size**2 * d
    return img.depth * layer + patches + 2 * n * d * width


def _encoder_weights(img: SigLIPConfig, width: int) -> int:
    d, f = img.width, img.mlp_dim
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
    ends = 3 * img.patch_size**2 * d + d + img.num_patches * d + 2 * d
    return img.depth * layer + ends + d * width + width


def _linear_weights(llm: GemmaConfig) -> int:
    """Weights of the decoder's layers that every token is multiplied with."""
    attention = llm.width * llm.head_dim * 2 * (llm.num_heads + llm.num_kv_heads)
    return llm.depth * (attention + 3 * llm.width * llm.mlp_dim)


def _decoder_bytes(llm: GemmaConfig, sizes: BytesPerNumber) -> float:
    norms = llm.depth * llm.width * (4 if llm.post_norms else 2) + llm.width
    embedding = llm.vocab_size * llm.width * sizes.embedding
    return _linear_weights(llm) * sizes.linear + norms * sizes.other + embedding
