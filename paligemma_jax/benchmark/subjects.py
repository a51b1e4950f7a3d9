"""What can be measured: one way to run one checkpoint, ours or a peer's.

Letters: B rows, H W pixels, T prompt tokens, V vocabulary.

Repeated calls with a clock, and with an eye on what else the machine does meanwhile.

The least time that a piece of work can take: its arithmetic and its bytes, from the sizes alone.

A multiplication with an addition counts as 2 operations. Bytes are those that must be read or
written once: weights, and keys and values. Attention is counted full, since the prefix of a
prefix-LM sees itself whole. Norms, activations and soft-caps are left out: they are below 0.1 %.

What a measured process does with the model.

Random pictures and prompts: the same for every implementation.

One random batch to train on: the same for every implementation.

Letters: B rows, H W pixels, T text tokens, the last one's target included.

What one process has found out about one case: a line of JSON on its way to the others.

Names of the models that can be measured: the published ones, and three smaller ones.

Resident memory of this process, without asking any library for its devices.

What is measured of training: some steps on one batch, and the losses that they give.
"""

import ctypes
import dataclasses
import enum
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paligemma_jax.config import GEMMA_2B, VARIANTS, GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sample:
    """One timed call: wall-clock seconds, and how many CPUs other processes kept busy (share)."""

    seconds: float
    others: float

    def a_token(self, tokens: int) -> "Sample":
        """Of one of so many tokens, the first of which was there when it began."""
        return dataclasses.replace(self, seconds=self.seconds / (tokens - 1))


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to go on measuring: at least `fewest` samples, then until a limit is reached."""

    fewest: int = 3
    most: int = 20
    seconds: float = 3.0


def sample(call: Callable[[], object]) -> Sample:
    """Times one call."""
    watch = Stopwatch()
    call()
    return watch.stop()


def measure(calls: Sequence[Callable[[], Sample]], effort: Effort) -> list[list[Sample]]:
    """What each call says of itself, in turn so that all see the same machine.

    They must be warm: compiled, and done once.
    """
    taken: list[list[Sample]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(taken[0]) < effort.fewest or (
        len(taken[0]) < effort.most and time.perf_counter() - start < effort.seconds
    ):
        for call, samples in zip(calls, taken, strict=True):
            samples.append(call())
    return taken


class Stopwatch:
    """Runs from its making on."""

    def __init__(self) -> None:
        self._busy = Busyness()
        self._start = time.perf_counter()

    def stop(self) -> Sample:
        """What passed until now."""
        return Sample(time.perf_counter() - self._start, self._busy.others())


class Busyness:
    """CPU time of the machine and of this process, from now on."""

    def __init__(self) -> None:
        self._start = self._read()

    def others(self) -> float:
        """Share of all CPUs that others have used since; 0.0 where the system does not tell."""
        (total, busy, own), (total0, busy0, own0) = self._read(), self._start
        if total <= total0:
            return 0.0
        return max(0.0, (busy - busy0) - (own - own0)) / (total - total0)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: of all CPUs, of those the busy ones, and this process's."""
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return 0.0, 0.0, 0.0
        tick = os.sysconf("SC_CLK_TCK")
        own = os.times()
        idle = fields[3] + fields[4]
        return sum(fields) / tick, (sum(fields) - idle) / tick, own.user + own.system


@dataclasses.dataclass(frozen=True)
class Work:
    """What must be done: floating-point operations, and bytes moved to and from memory."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a number: in the decoder's matrices, in its token table, and anywhere else."""

    matrix: float
    table: float
    other: float

    @classmethod
    def of(cls, size: float) -> "Sizes":
        """The same everywhere."""
        return cls(size, size, size)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a machine can do: bytes a second, and operations a second in one precision."""

    bandwidth: float
    rate: float

    def seconds(self, *parts: Work) -> float:
        """Least time for parts that come one after the other, each bound by one or the other."""
        return sum(max(p.flops / self.rate, p.bytes / self.bandwidth) for p in parts)


def encode_work(config: PaliGemmaConfig, images: int, sizes: Sizes) -> Work:
    """The image encoder and its projection."""
    return Work(
        images * _encoder_flops(config.img, config.llm.width),
        _encoder_weights(config.img, config.llm.width) * sizes.other,
    )


def prefill_work(config: PaliGemmaConfig, rows: int, text: int, sizes: Sizes) -> Work:
    """The decoder over one picture and `text` tokens a row, with logits at the last position."""
    llm, length = config.llm, config.img.num_patches + text
    attention = llm.depth * 4 * length**2 * llm.num_heads * llm.head_dim
    flops = 2 * length * _matrices(llm) + attention + 2 * _table(llm)
    written = rows * length * cache_values(llm) * sizes.other
    return Work(rows * flops, _decoder_bytes(llm, sizes) + written)


def decode_work(config: PaliGemmaConfig, rows: int, context: int, sizes: Sizes) -> Work:
    """One more token a row, after `context` tokens of pictures and text a row."""
    llm = config.llm
    attention = llm.depth * 4 * context * llm.num_heads * llm.head_dim
    flops = 2 * (_matrices(llm) + _table(llm)) + attention
    cache = rows * (context + 1) * cache_values(llm) * sizes.other
    return Work(rows * flops, _decoder_bytes(llm, sizes) + cache)


def cache_values(llm: GemmaConfig) -> int:
    """Numbers that one token leaves in the key-value cache."""
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


def _matrices(llm: GemmaConfig) -> int:
    """Weights of the layers that are multiplied with every token."""
    attention = llm.width * llm.head_dim * 2 * (llm.num_heads + llm.num_kv_heads)
    return llm.depth * (attention + 3 * llm.width * llm.mlp_dim)


def _table(llm: GemmaConfig) -> int:
    return llm.vocab_size * llm.width


def _decoder_bytes(llm: GemmaConfig, sizes: Sizes) -> float:
    norms = llm.depth * llm.width * (4 if llm.post_norms else 2) + llm.width
    return _matrices(llm) * sizes.matrix + norms * sizes.other + _table(llm) * sizes.table


class Kind(enum.StrEnum):
    """The implementations."""

    OURS = "ours"
    SCANNED = "scanned"  # see `scanned`
    HUGGING_FACE = "huggingface"  # `transformers` as it comes: eager, growing cache
    HUGGING_FACE_COMPILED = "huggingface-compiled"  # static cache and torch.compile


PEERS = (Kind.HUGGING_FACE, Kind.HUGGING_FACE_COMPILED)


class Precision(enum.StrEnum):
    """What weights are stored in; integers are for the decoder's, quantized by that name."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT8_DYNAMIC = "int8-dynamic"
    INT4 = "int4"

    @property
    def quantized(self) -> bool:
        """Whether it is of integers, which peers are not measured with."""
        return self not in (Precision.FLOAT32, Precision.BFLOAT16)

    @property
    def floats(self) -> "Precision":
        """What is no integer: activations, cache, image encoder."""
        return Precision.BFLOAT16 if self.quantized else self

    @property
    def sizes(self) -> Sizes:
        """Bytes of a number; those of the integers' scales are left out."""
        match self:
            case Precision.FLOAT32:
                return Sizes.of(4.0)
            case Precision.BFLOAT16:
                return Sizes.of(2.0)
            case Precision.INT4:
                return Sizes(matrix=0.5, table=1.0, other=2.0)
        return Sizes(matrix=1.0, table=1.0, other=2.0)


class Implementation(Protocol):
    """One way to run one checkpoint.

    Every method that is timed prepares its inputs (on the device, where there is one) and returns a
    call; calling it does the work once and waits for its end. A call can be repeated.

    Prompts have no padding and no image tokens: an implementation that wants image tokens in its
    prompt puts them before it.
    """

    def encode_images(self, images: np.ndarray) -> Callable[[], None]:
        """The image encoder and its projection. `images` f32[B, H, W, 3] in [-1, 1]."""
        ...

    def first_token(self, images: np.ndarray, tokens: np.ndarray) -> Callable[[], np.ndarray]:
        """Image encoder, prefill and argmax; the call gives i32[B]. `tokens` i32[B, T]."""
        ...

    def answer(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> Callable[[], np.ndarray]:
        """Greedy answers from pictures to tokens, never ended early; gives i32[B, new_tokens]."""
        ...

    def decoding(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> Callable[[], Sample]:
        """Such answers; a call says how long it took from the first token to the last.

        What compiles has been compiled before the first call.
        """
        ...

    def logits(self, images: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """f32[B, V] after the prompt; V is the model's own, without rows of padding."""
        ...

    def peak_bytes(self) -> int:
        """Most memory this process held so far: device memory, on CPUs resident memory."""
        ...


def open_implementation(kind: Kind, weights: Path, dtype: Precision) -> Implementation:
    """Loads the Hugging Face directory `weights` in `dtype`.

    Raises:
      MissingExtraError: where the peer is not installed.
      ConfigError: where the peer cannot run this model in this way.
    """
    if kind in PEERS and dtype.quantized:
        raise ConfigError(
            f"{kind} is measured with weights as they are, not in {dtype}. float32 and bfloat16 "
            f"fit. Leave it out: paligemma bench --dtype {dtype} --implementation ours"
        )
    match kind:
        case Kind.OURS:
            from paligemma_jax.benchmark.ours import open_ours

            return open_ours(weights, dtype)
        case Kind.SCANNED:
            from paligemma_jax.benchmark.ours import open_scanned

            return open_scanned(weights, dtype)
        case Kind.HUGGING_FACE | Kind.HUGGING_FACE_COMPILED:
            from paligemma_jax.benchmark.huggingface import open_huggingface

            compiled = kind is Kind.HUGGING_FACE_COMPILED
            return open_huggingface(weights, dtype.value, compiled=compiled)


class Task(enum.StrEnum):
    """Answer prompts, or train: all weights, or adapters on the language model's layers."""

    ANSWER = "answer"
    FULL = "full"
    LORA = "lora"


TRAINING = (Task.FULL, Task.LORA)


PROMPT = 32  # tokens


def random_images(config: PaliGemmaConfig, batch: int) -> np.ndarray:
    """f32[B, H, W, 3] in [-1, 1]."""
    size = config.img.image_size
    pixels = np.random.default_rng(batch).uniform(-1, 1, (batch, size, size, 3))
    return pixels.astype(np.float32)


def random_prompts(
    config: PaliGemmaConfig, batch: int, length: int = PROMPT
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, and tokens i32[B, length] that begin with the begin-of-sequence token."""
    last = min(config.llm.vocab_size, 250_000)  # above are <loc> and <seg>
    tokens = np.random.default_rng(batch + length).integers(3, last, (batch, length))
    tokens[:, 0] = 2
    return random_images(config, batch), tokens.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class TrainInputs:
    """Pictures f32[B, H, W, 3], tokens i32[B, T] without padding, and how many are prompt."""

    images: np.ndarray
    tokens: np.ndarray
    prefix: int

    @property
    def in_suffix(self) -> np.ndarray:
        """bool[B, T]: the tokens to learn."""
        return np.broadcast_to(np.arange(self.tokens.shape[1]) >= self.prefix, self.tokens.shape)


def random_examples(config: PaliGemmaConfig, batch: int, text: int, suffix: int) -> TrainInputs:
    """`batch` pictures, each with `text` tokens for the model to read, and `suffix` to learn.

    Rows have equally many tokens, so that the mean over examples (ours) is the mean over tokens
    (Hugging Face's).
    """
    images, tokens = random_prompts(config, batch, text + 1)
    return TrainInputs(images, tokens, text + 1 - suffix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One case in one process.

    Attributes:
      seconds: the samples.
      others: for each, the share of all CPUs that other processes used meanwhile.
      rows: pictures or tokens that one sample yields; 0 where that says nothing.
      flops, bytes: for each part of the work, what it must do and move at least.
      compilations: programs that JAX made for it; None for a peer.
      peak_bytes: most memory that the process held so far.
      numbers: what else was found out.
      error: why it could not be measured.
      task: what the process did with the model.
    """

    model: str
    kind: Kind
    dtype: Precision
    repeat: int
    case: str
    seconds: tuple[float, ...] = ()
    others: tuple[float, ...] = ()
    rows: int = 0
    flops: tuple[float, ...] = ()
    bytes: tuple[float, ...] = ()
    compilations: int | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str | None = None
    task: Task = Task.ANSWER

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """Inverse of `to_dict`."""
        lists = {k: tuple(values[k]) for k in ("seconds", "others", "flops", "bytes")}
        kinds = {
            "kind": Kind(values["kind"]),
            "dtype": Precision(values["dtype"]),
            "task": Task(values.get("task", Task.ANSWER)),  # files of before have none
        }
        return cls(**{**values, **lists, **kinds})


# Four layers of PaliGemma 3B each side and a small table: 0.6 billion parameters, which fit a
# laptop and still take all of their time for what the large ones take theirs for.
MID = PaliGemmaConfig(
    img=SigLIPConfig(depth=4),
    llm=dataclasses.replace(GEMMA_2B, depth=4, vocab_size=32_768),
)
# Half of that, which 8 GB are enough to train all of.
SMALL = dataclasses.replace(
    MID,
    img=dataclasses.replace(MID.img, depth=2),
    llm=dataclasses.replace(MID.llm, depth=2),
)
# For trying the benchmark itself.
TINY = PaliGemmaConfig(
    img=SigLIPConfig(image_size=56, width=64, depth=2, mlp_dim=128, num_heads=4),
    llm=dataclasses.replace(
        GEMMA_2B,
        width=64,
        depth=2,
        mlp_dim=128,
        num_heads=4,
        head_dim=16,
        query_scale=16**-0.5,
        vocab_size=512,
    ),
)
MODELS: dict[str, PaliGemmaConfig] = {"tiny": TINY, "small": SMALL, "mid": MID, **VARIANTS}


def find_model(name: str) -> PaliGemmaConfig:
    """The architecture of a model's name; raises ConfigError for an unknown one."""
    if name not in MODELS:
        raise ConfigError(
            f"There is no model {name!r} to measure. tiny, small, mid and the published names fit. "
            "List them with: paligemma models"
        )
    return MODELS[name]


def most_resident() -> int:
    """Bytes at their highest so far, pages of mapped files that were read included."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):  # ru_maxrss may be the parent process's, here
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def forget_most_resident() -> bool:
    """Makes `most_resident` begin anew; returns False where the system cannot.

    What was freed goes back to the system first: it is resident, and nobody's.
    """
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


_LOSS = "loss "  # and the step's number: a loss among a record's numbers


class Trainer(Protocol):
    """One way to train one model, on one batch.

    Masters and moments are float32. The optimizer is AdamW without decay, at a constant rate, of
    gradients that are clipped to a norm of 1.
    """

    def step(self) -> float:
        """One update, to the end of its work; returns the loss before it."""
        ...

    def forget_peak(self) -> None:
        """Begins to measure `peak_bytes` anew, where that is possible."""
        ...

    def peak_bytes(self) -> int:
        """Most memory held: of the device, on CPUs of the process."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainSteps:
    """Steps of one batch.

    Attributes:
      task: what is trained.
      batch: rows, of one picture each.
      text: tokens that the model reads after a picture.
      suffix: tokens of them to learn.
      compared: first steps whose losses are compared.
      effort: steps that are timed, after the first one.
    """

    task: Task
    batch: int
    text: int = 64
    suffix: int = 32
    compared: int = 3
    effort: Effort = Effort(3, 12, 10.0)

    @property
    def name(self) -> str:
        """The same for all implementations."""
        kind = "LoRA" if self.task is Task.LORA else "full"
        return f"{kind} training, batch {self.batch}"

    @property
    def learning_rate(self) -> float:
        """As the configurations of this library have it."""
        return 2e-4 if self.task is Task.LORA else 1e-5

    def inputs(self, config: PaliGemmaConfig) -> TrainInputs:
        """The batch."""
        return random_examples(config, self.batch, self.text, self.suffix)

    def operations(self, config: PaliGemmaConfig) -> float:
        """Of one step, as `paligemma train` counts them for its MFU (see `training.speed`).

        Each product once forward, once for the gradient in what it takes and once for that in its
        weights, where these are trained; nothing twice for being computed again.
        """
        from paligemma_jax.training.logging import work_of

        whole = self.task is Task.FULL
        work = work_of(config, self.text, image_trained=whole, text_trained=whole)
        return self.batch * work.operations

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainSteps":
        """Inverse of `to_dict`."""
        changed = {"task": Task(values["task"]), "effort": Effort(**values["effort"])}
        return cls(**{**values, **changed})


@dataclasses.dataclass(frozen=True)
class Trained:
    """Timed steps, and the losses of the first ones."""

    samples: list[Sample]
    losses: list[float]


def train(trainer: Trainer, case: TrainSteps) -> Trained:
    """Steps the trainer, which has made one step already, that gave `losses[0]`."""
    losses: list[float] = []
    samples: list[Sample] = []
    effort = case.effort
    fewest = max(effort.fewest, case.compared - 1)
    while len(samples) < fewest or (
        len(samples) < effort.most and sum(s.seconds for s in samples) < effort.seconds
    ):
        samples.append(sample(lambda: losses.append(trainer.step())))
    return Trained(samples, losses)


def train_rates(numbers: dict[str, float], per_second: float, rate: float) -> dict[str, float]:
    """What follows from a row's samples and operations a second, as further numbers of it."""
    found: dict[str, float] = {}
    if "tokens_a_sample" in numbers:
        found["tokens_a_second"] = per_second * numbers["tokens_a_sample"]
    if "datasheet_rate" in numbers:
        found["share_of_datasheet"] = rate / numbers["datasheet_rate"]
    return found


def loss_numbers(losses: list[float]) -> dict[str, float]:
    """As a record's numbers."""
    return {f"{_LOSS}{step}": loss for step, loss in enumerate(losses, 1)}


def losses_of(numbers: dict[str, float]) -> list[float]:
    """Inverse of `loss_numbers`."""
    found = {name: value for name, value in numbers.items() if name.startswith(_LOSS)}
    return [found[name] for name in sorted(found)]
