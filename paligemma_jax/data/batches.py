"""Records -> batches: shuffled by a seed, divided among processes, and at any place again.

Which record stands where in an endless sequence of records; any place is told on its own.

What training does about records that cannot be used.

Records -> the arrays of one batch, in whatever process it happens.

Several sources of records, one after the other.

Several data sets in one run, each with a weight.

Processes that read data: they end with the trainer, and leave accelerators alone.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from paligemma_jax.data.record import Record, RecordSource, Transform, check_number, fingerprint
from paligemma_jax.errors import ConfigError, DatasetError, MissingExtraError, PaliGemmaError
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.processor import Arrays, Batch, Overflow, Processor, Refuse
from paligemma_jax.processing.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Draw:
    """A record by its number in the source, how often its part was gone through, and which part."""

    number: int
    epoch: int
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Order:
    """All records of one source, epoch by epoch, each epoch shuffled by itself."""

    records: int
    seed: int
    shuffle: bool

    def draw(self, place: int) -> Draw:
        """What stands at `place`, from 0 up."""
        number = int(self._shuffled[place] if self.shuffle else place) % self.records
        return Draw(number, place // self.records)

    def replace(self, draw: Draw, rng: np.random.Generator) -> Draw:
        """Another record at random, in place of one that cannot be used."""
        return dataclasses.replace(draw, number=int(rng.integers(self.records)))

    @functools.cached_property
    def _shuffled(self) -> Any:
        import grain

        # Hashed: grain takes seed + epoch, so neighbouring seeds would share their orders.
        (seed,) = np.random.SeedSequence([self.seed]).generate_state(1)
        return grain.MapDataset.range(self.records).shuffle(seed=int(seed))


@dataclasses.dataclass(frozen=True)
class MixedOrder:
    """Parts that lie one after the other in a source, drawn from by rule, each in its own `Order`.

    `sizes` are records of each part, and `shares` how many of them a round has. After any number n
    of records a part has had its share of n, give or take less than one record.
    """

    sizes: tuple[int, ...]
    shares: tuple[int, ...]
    seed: int
    shuffle: bool

    @property
    def records(self) -> int:
        """Those of all parts."""
        return sum(self.sizes)

    def draw(self, place: int) -> Draw:
        """What stands at `place`, from 0 up."""
        rounds, within = divmod(place, len(self._round))
        part, before = self._round[within]
        own = self._orders[part].draw(rounds * self.shares[part] + before)
        return Draw(self._starts[part] + own.number, own.epoch, part)

    def replace(self, draw: Draw, rng: np.random.Generator) -> Draw:
        """Another record of the same part at random, in place of one that cannot be used."""
        number = self._starts[draw.part] + int(rng.integers(self.sizes[draw.part]))
        return dataclasses.replace(draw, number=number)

    @functools.cached_property
    def _round(self) -> list[tuple[int, int]]:
        return interleave(self.shares)

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [sum(self.sizes[:part]) for part in range(len(self.sizes))]

    @functools.cached_property
    def _orders(self) -> list[Order]:
        # Each part has its own seed: one source in two parts comes in two orders.
        seeds = [np.random.SeedSequence([self.seed, part]) for part in range(len(self.sizes))]
        return [
            Order(size, int(seed.generate_state(1)[0]), self.shuffle)
            for size, seed in zip(self.sizes, seeds, strict=True)
        ]


def interleave(shares: tuple[int, ...]) -> list[tuple[int, int]]:
    """A round of sum(shares) places: at each a part, and how many places it had before.

    Tasks that share a processor are put in order so (Baruah and others, "Proportionate progress",
    1996): of the parts that are not ahead of their share, the one that would fall behind first.
    Then none is ever a whole record off: such an order exists, and the earliest deadline finds it.
    """
    total = sum(shares)
    had = [0] * len(shares)
    found = []
    for place in range(total):
        _, part = min(
            (-(-(count + 1) * total // share), part)  # the place by which it must have one more
            for part, (count, share) in enumerate(zip(had, shares, strict=True))
            if count * total < (place + 1) * share
        )
        found.append((part, had[part]))
        had[part] += 1
    return found


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that was left out: its number in the source, and what was wrong with it."""

    number: int
    reason: str


def check_skipped(skipped: int, records: int, last: Skipped, most: float) -> None:
    """Raises DatasetError if `skipped` different records are more than the fraction `most`."""
    if not most:
        raise DatasetError(
            f"Record {last.number} of {records} cannot be used: {last.reason} List all such records "
            "with: paligemma train --check DATA; or skip some of them: max_bad_records=0.01"
        )
    if skipped > max(1, most * records):
        raise DatasetError(
            f"{skipped} of {records} records cannot be used, more than {most:.1%}; the last is "
            f"number {last.number}: {last.reason} List all with: paligemma train --check DATA; or "
            f"allow more: max_bad_records={min(1.0, 2 * skipped / records):.2g}"
        )


_TRIES = 64  # other records to take the place of a bad one

Row = tuple[np.ndarray | None, Arrays, str]  # pictures f32[N, H, W, 3], tokens and masks, id


@dataclasses.dataclass(frozen=True)
class BatchSource:
    """Batches by number, of this process: what grain reads.

    Batch b of all processes together holds the places b * P * B .. (b + 1) * P * B of the order,
    and process p the p-th part of them in one piece, so that the batch is the same for any number
    of processes. Chance comes from the place too: neither workers nor a restart change it.
    `transforms` are those of each part that the order tells of.
    """

    source: RecordSource
    processor: Processor
    order: Order | MixedOrder
    transforms: tuple[tuple[Transform, ...], ...]
    batch_size: int
    length: int
    on_overflow: Overflow
    max_bad_records: float
    process_index: int
    process_count: int
    batches: int

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        first = (index * self.process_count + self.process_index) * self.batch_size
        skipped: list[Skipped] = []
        rows = [self._row(place, skipped) for place in range(first, first + self.batch_size)]
        pictures, texts, ids = zip(*rows, strict=True)
        tokens = np.stack([text["text"] for text in texts])
        mask_ar = np.stack([text["mask_ar"] for text in texts])
        mask_loss = np.stack([text["mask_loss"] for text in texts])
        last = tokens[:, -1]
        return {
            "images": _stack(pictures, ids),
            "tokens": tokens,
            "mask_ar": mask_ar,
            "mask_input": (mask_ar == 0) | (mask_loss == 1),
            "mask_loss": mask_loss,
            "ids": list(ids),
            "skipped": [(skip.number, skip.reason) for skip in skipped],
            # A row without room for padding ends in eos, unless it was cut.
            "cut": int(np.sum((last != Tokenizer.pad_id) & (last != Tokenizer.eos_id))),
        }

    def _row(self, place: int, skipped: list[Skipped]) -> Row:
        draw = self.order.draw(place)
        choose = None
        for _ in range(_TRIES):
            try:
                return self._encode(draw, place)
            except PaliGemmaError as e:
                bad = Skipped(draw.number, str(e))
            except OSError as e:
                bad = Skipped(draw.number, f"{e.strerror or e}: {e.filename}")
            skipped.append(bad)
            # The policy has its say here too, or a source of bad records only would be read whole.
            different = len({skip.number for skip in skipped})
            check_skipped(different, self.order.records, bad, self.max_bad_records)
            choose = choose or np.random.default_rng([self.order.seed, place, 1])
            draw = self.order.replace(draw, choose)
        raise DatasetError(
            f"{_TRIES} records one after another cannot be used; the last is {skipped[-1].reason} "
            "Readable records fit. See all that are not with: paligemma train --check DATA"
        )

    def _encode(self, draw: Draw, place: int) -> Row:
        record = dataclasses.replace(self.source[draw.number], epoch=draw.epoch)
        rng = np.random.default_rng([self.order.seed, place])
        if record.size is not None:
            record = check_size(record)
        for transform in self.transforms[draw.part]:
            record = transform(record, rng)
        if len(record.answers) > 1:
            raise DatasetError(
                f"{record.id} has {len(record.answers)} answers, and nothing chooses one. A "
                "transform that does fits. Call with transforms=(RandomAnswer(),)"
            )
        try:
            texts = self.processor.encode_train(
                record.prefix, record.suffix, self.length, self.on_overflow
            )
            preprocess = self.processor.image
            pictures = [preprocess(picture) for picture in record.images]
        except PaliGemmaError as e:
            raise DatasetError(f"{record.id}: {e}") from e
        return (np.stack(pictures) if pictures else None), texts, record.id


def check_size(record: Record) -> Record:
    """The record with its picture read; DatasetError if that is not of the size it should have."""
    try:
        pictures = tuple(load_image(picture) for picture in record.images)
    except PaliGemmaError as e:
        raise DatasetError(f"{record.id}: {e}") from e
    for picture in pictures:
        if record.size is not None and picture.size != record.size:
            raise DatasetError(
                f"{record.id}: the picture is {picture.width} x {picture.height} pixels, and the "
                f"data says {record.size[0]} x {record.size[1]}, so its boxes would be wrong. "
                "Equal sizes fit. Correct the data, or save the picture upright, without EXIF."
            )
    return dataclasses.replace(record, images=pictures)


def _stack(pictures: Sequence[np.ndarray | None], ids: Sequence[str]) -> np.ndarray | None:
    counts = [0 if one is None else len(one) for one in pictures]
    if len(set(counts)) > 1:
        other = next(place for place, count in enumerate(counts) if count != counts[0])
        raise DatasetError(
            f"The records of a batch differ in their number of pictures: {ids[0]} has {counts[0]}, "
            f"{ids[other]} has {counts[other]}. Equally many fit. Make a source of each kind, and "
            "train on one, or repeat pictures."
        )
    stacked = [one for one in pictures if one is not None]
    return np.stack(stacked) if stacked else None


@dataclasses.dataclass(frozen=True)
class ConcatSource:
    """The records of all sources, numbered through; shuffled they are mixed by their sizes."""

    sources: tuple[RecordSource, ...]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        index = check_number(index, len(self), "several sources")
        which = bisect.bisect_right(self._ends, index)
        return self.sources[which][index - (self._ends[which - 1] if which else 0)]

    def fingerprint(self) -> str:
        """Of all of them."""
        text = " ".join(fingerprint(source) for source in self.sources)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.sources)))


ROUND = 1 << 16  # records, at most, after which parts come in the same sequence again


@dataclasses.dataclass(frozen=True)
class MixtureComponent:
    """One data set of a `Mixture`.

    Attributes:
      records: what a run takes as `train`, a `Mixture` excepted; `make_batches` wants a source.
      weight: how many of its records come, beside the weights of the other parts; positive.
      transforms: changes made to its records, instead of the run's; None: the run's.
    """

    records: Any
    weight: float = 1.0
    transforms: tuple[Transform, ...] | None = None

    def __post_init__(self) -> None:
        weight, transforms = self.weight, self.transforms
        number = isinstance(weight, int | float | np.number) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(
                f"The weight of a part is {weight!r}. A positive, finite number fits. Leave the "
                "part out, or write for example: MixtureComponent(records, weight=2.0)"
            )
        if isinstance(self.records, Mixture | MixtureComponent):
            raise ConfigError(
                f"A part holds a {type(self.records).__name__}. A path, a source or a list of "
                "records fits. Put all parts into one mixture: Mixture(MixtureComponent(a, 3), MixtureComponent(b, 1))"
            )
        if transforms is not None and not isinstance(transforms, tuple | list):
            raise ConfigError(
                f"The transforms of a part are {transforms!r}. A tuple of them fits. Write for "
                "example: MixtureComponent(records, transforms=(RandomAnswer(),))"
            )

    def __repr__(self) -> str:
        records, own = self.records, self.transforms
        told = f"{type(records).__name__} of {len(records)}" if _is_rows(records) else repr(records)
        more = "" if own is None else f", transforms={own!r}"
        return f"MixtureComponent({told}, weight={self.weight!r}{more})"


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Mixture:
    """Data sets to train on together, by weights.

        Mixture(MixtureComponent("captions.jsonl", 3.0), MixtureComponent(Data("coco", reader=...), 1.0))

    Three of four records come from the captions then, however many there are. After any number of
    records each part has had its share of them, give or take less than one record. Each part is
    shuffled and gone through by itself, so a small one of large weight comes round more often. An
    epoch of the mixture is as many records as all parts have together.

    A source of records itself: those of all parts one after the other, each once. `make_batches`
    and training draw from it by weight. Weights whose shares are no whole numbers of 65,536 records
    or fewer are rounded to such.

    Raises ConfigError for no parts, what is no `MixtureComponent`, and a weight too small beside the others.
    """

    components: tuple[MixtureComponent, ...] = dataclasses.field(init=False)

    def __init__(self, *parts: MixtureComponent):
        if not parts:
            raise ConfigError(
                "The mixture has no parts. At least one fits. Write for example: "
                "Mixture(MixtureComponent(captions, 3.0), MixtureComponent(boxes, 1.0))"
            )
        for place, part in enumerate(parts):
            if not isinstance(part, MixtureComponent):
                raise ConfigError(
                    f"Component {place} of the mixture is a {type(part).__name__}. A MixtureComponent fits. Write "
                    "for example: Mixture(MixtureComponent(captions, 3.0), MixtureComponent(boxes, 1.0))"
                )
        object.__setattr__(self, "components", parts)
        if not all(self.shares):
            small = self.shares.index(0)
            raise ConfigError(
                f"Component {small} of the mixture has the weight {parts[small].weight!r}, less than a "
                f"record of {ROUND:,}. A larger one fits, or no such part. Write for example: "
                f"MixtureComponent(records, weight={sum(float(part.weight) for part in parts) / 1000:.2g})"
            )

    def __repr__(self) -> str:
        return f"Mixture({', '.join(map(repr, self.components))})"

    def __len__(self) -> int:
        return len(self._joined)

    def __getitem__(self, index: int) -> Record:
        return self._joined[index]

    @functools.cached_property
    def shares(self) -> tuple[int, ...]:
        """Records of each part in a round of their sum, in smallest whole numbers."""
        # As they are written: 0.1 is a tenth here, which no float is.
        weights = [Fraction(str(float(part.weight))) for part in self.components]
        whole = [int(x * math.lcm(*(w.denominator for w in weights))) for x in weights]
        whole = [x // math.gcd(*whole) for x in whole]
        return tuple(whole) if sum(whole) <= ROUND else _rounded(whole)

    @property
    def sources(self) -> tuple[RecordSource, ...]:
        """Those of the parts; DatasetError where there is something else, or nothing."""
        return self._joined.sources

    def opened(self, open_one: Callable[[Any, int], RecordSource]) -> "Mixture":
        """With the sources that `open_one` makes of each part's records and its number."""
        return Mixture(
            *(
                dataclasses.replace(part, records=open_one(part.records, place))
                for place, part in enumerate(self.components)
            )
        )

    def order(self, seed: int, shuffle: bool) -> MixedOrder:
        """In which order its records come."""
        sizes = tuple(len(source) for source in self.sources)
        return MixedOrder(sizes, self.shares, seed, shuffle)

    def transforms(self, default: Sequence[Transform]) -> tuple[tuple[Transform, ...], ...]:
        """Those of each part; `default` where it has none of its own."""
        own = [part.transforms for part in self.components]
        return tuple(tuple(default if one is None else one) for one in own)

    def titles(self) -> list[str]:
        """Of each part, in words: its share, and how often its records come in an epoch."""
        total = sum(self.shares)
        titles = []
        for place, (share, source) in enumerate(zip(self.shares, self.sources, strict=True)):
            times = share / total * len(self) / len(source)
            titles.append(
                f"part {place}, {share / total:.1%} of what is drawn, each record {times:.3g} "
                "times an epoch"
            )
        return titles

    def fingerprint(self) -> str:
        """Of all parts and their shares."""
        text = " ".join(
            f"{share} {fingerprint(source)}"
            for share, source in zip(self.shares, self.sources, strict=True)
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @functools.cached_property
    def _joined(self) -> ConcatSource:
        for place, part in enumerate(self.components):
            if _is_rows(part.records) or not _has_records(part.records):
                raise DatasetError(
                    f"Component {place} of the mixture, {part!r}, is no source of records yet, or an "
                    "empty one. A source fits. Open it, with open_source(path) or SequenceSource(list); "
                    "finetune does so itself."
                )
        return ConcatSource(tuple(part.records for part in self.components))


def _is_rows(records: Any) -> bool:
    return isinstance(records, list | tuple)


def _has_records(records: Any) -> bool:
    given = isinstance(records, RecordSource) and not isinstance(records, str | os.PathLike)
    return given and len(records) > 0


def _rounded(whole: Sequence[int]) -> tuple[int, ...]:
    """Shares of `ROUND` by largest remainders."""
    total = sum(whole)
    shares = [ROUND * x // total for x in whole]
    rest = sorted(range(len(whole)), key=lambda part: -(ROUND * whole[part] % total))
    for part in rest[: ROUND - sum(shares)]:
        shares[part] += 1
    divisor = math.gcd(*shares)
    return tuple(share // divisor for share in shares)


_INTERVAL = 1.0  # seconds


def start_worker(index: int, count: int) -> None:
    """Runs first in each process that reads data."""
    # Whoever uses jax here must not take the accelerator's memory. If it is imported already, as by
    # what is read here, it no longer looks at the environment.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # Ctrl-C goes to all processes of a terminal; the trainer decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Otherwise a killed trainer would leave its workers behind for ever.
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process once `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(_INTERVAL)
    os._exit(1)


def parse_absl_flags() -> None:
    """grain asks absl for its flags, which nobody has parsed in a program that uses none."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


_ENDLESS = 1 << 40  # batches
_READ_AHEAD = 2  # batches, of each worker
_FORMAT = 1
_ARRAYS = ("images", "tokens", "mask_ar", "mask_input", "mask_loss")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Arrays to train on, numpy's, and the ids of the records they come from.

    Letters: B rows, N pictures a row, S pixels, T text tokens. `batch.images` is f32[B, N, S, S, 3]
    or None; tokens, mask_ar and mask_loss are i32[B, T + 1] and mask_input bool[B, T + 1], as
    `Processor.encode_train(prefix, suffix, T)` gives them: all but the last are inputs, all but the
    first are targets.
    """

    batch: Batch
    ids: tuple[str, ...]


def make_batches(
    source: RecordSource,
    processor: Processor,
    *,
    batch_size: int,
    length: int,
    seed: int,
    transforms: Sequence[Transform] = (),
    shuffle: bool = True,
    epochs: int | None = None,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    on_overflow: Overflow | None = None,
    max_bad_records: float = 0.0,
) -> "Batches":
    """An iterator of `TrainBatch`.

    The batches depend on nothing but the source, the transforms, `seed` and the size of the batch
    of all processes together: not on `workers`, nor on how the batch is divided. Epochs follow one
    another without a gap, and records that do not fill the last batch are left out.

    Args:
      source: the records; those of a `Mixture` come by its weights.
      processor: makes arrays of pictures and texts.
      batch_size: rows of this process's part of a batch.
      length: T, tokens of prompt and answer; those of longer ones are an error, see `on_overflow`.
      seed: from 0 up; of the order and of the transforms.
      transforms: change each record, in turn, but those of a part that has its own; must be
        picklable if there are workers.
      shuffle: each epoch in its own order; otherwise in that of the source.
      epochs: how often each record comes, or as many records of a `Mixture`; without, there is no
        end.
      workers: processes that read ahead; with 0, threads of this one do. A script that asks for any
        must keep its own work under `if __name__ == "__main__":`.
      process_index, process_count: which part of each batch this process is to have.
      on_overflow: `Refuse()`, the default, makes a text that does not fit a bad record.
      max_bad_records: fraction of the records that may be unusable; such are skipped, and one may
        always be. 0.0: the first one is an error.

    Raises:
      MissingExtraError: without grain.
      ConfigError: for numbers that do not fit.
      DatasetError: for fewer records than a batch needs; while iterating, for bad records.
    """
    _check(batch_size, length, seed, epochs, workers, process_index, process_count)
    try:
        import grain  # noqa: F401
    except ImportError as e:
        raise MissingExtraError("Reading training data", "data") from e
    together = batch_size * process_count
    batches = _ENDLESS if epochs is None else len(source) * epochs // together
    mixed = isinstance(source, Mixture)  # records of a small part may come twice in a batch
    if not batches or (len(source) < together and not mixed):
        raise DatasetError(
            f"{len(source)} records do not fill a batch of {together}. At least as many records "
            f"as rows fit. Make the batch smaller: batch_size={max(1, len(source) // 2)}"
        )
    maker = BatchSource(
        source=source,
        processor=processor,
        order=source.order(seed, shuffle) if mixed else Order(len(source), seed, shuffle),
        transforms=source.transforms(transforms) if mixed else (tuple(transforms),),
        batch_size=batch_size,
        length=length,
        on_overflow=on_overflow or Refuse(),
        max_bad_records=max_bad_records,
        process_index=process_index,
        process_count=process_count,
        batches=batches,
    )
    return Batches(maker, workers)


class Batches(Iterator[TrainBatch]):
    """What `make_batches` gives. Its place can be saved and taken up again.

    Attributes:
      skipped: records that were left out so far, each once.
      cut: rows so far whose text was cut by `on_overflow`.
    """

    def __init__(self, maker: BatchSource, workers: int):
        self._maker = maker
        self._workers = workers
        self._next = 0
        self._reader: Any = None
        self._fingerprint: str | None = None
        self.skipped: tuple[Skipped, ...] = ()
        self.cut = 0

    def __len__(self) -> int:
        """Batches in all; a very large number where there is no end."""
        return len(self._maker)

    @property
    def position(self) -> int:
        """The number of the batch that comes next."""
        return self._next

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> TrainBatch:
        if self._next >= len(self._maker):
            self.close()
            raise StopIteration
        if self._reader is None:
            self._reader = self._open()
        try:
            arrays = next(self._reader)
        except BaseException as e:
            self.close()
            if isinstance(e, PaliGemmaError):
                e.__notes__ = []  # grain's, about its own frames
            elif isinstance(e, RuntimeError) and "Worker process was terminated" in str(e):
                raise DatasetError(
                    "A process that reads data has ended from outside; often memory ran out. Fewer "
                    "of them fit. Start again from the last checkpoint with: workers=1"
                ) from e
            raise
        self._count(arrays)
        self._next += 1
        own: dict[str, Any] = {name: self._own(arrays[name]) for name in _ARRAYS}
        return TrainBatch(Batch(**own), tuple(arrays["ids"]))

    def state(self) -> bytes:
        """The place behind the last batch that was given, for `restore`."""
        values = self._identity() | {
            "batch": self._next,
            "skipped": [[skip.number, skip.reason] for skip in self.skipped],
            "cut": self.cut,
        }
        return json.dumps(values).encode()

    def restore(self, state: bytes) -> None:
        """Goes on behind the place that was saved; the batches are those that would have come.

        Raises DatasetError, naming every difference, if the state is of other data, another seed,
        or another size of the batch of all processes together.
        """
        try:
            values = json.loads(state)
            batch, skipped, cut = values["batch"], values["skipped"], values["cut"]
        except (ValueError, KeyError, TypeError) as e:
            raise DatasetError(
                "The saved place in the data is damaged. One that Batches.state() gave fits. Take "
                "an earlier checkpoint, or begin the data anew without restore()."
            ) from e
        differences = [
            f"{name} is {mine!r}, and was {values.get(name)!r}"
            for name, mine in self._identity().items()
            if values.get(name) != mine
        ]
        if differences:
            raise DatasetError(
                f"The saved place in the data does not fit: {'; '.join(differences)}. The same "
                "data, seed and batch fit, with any number of workers and processes. Set them as "
                "they were, or begin the data anew without restore()."
            )
        self.close()
        self._next = batch
        self.skipped = tuple(Skipped(number, reason) for number, reason in skipped)
        self.cut = cut

    def close(self) -> None:
        """Ends threads and processes that read ahead; iterating on starts them again."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Any:
        import grain

        options = grain.ReadOptions(
            num_threads=1 if self._workers else 2, prefetch_buffer_size=_READ_AHEAD
        )
        data: Any = grain.MapDataset.source(self._maker)[self._next :].to_iter_dataset(options)
        if self._workers:
            parse_absl_flags()
            data = data.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_READ_AHEAD),
                worker_init_fn=start_worker,
            )
        return iter(data)

    def _own(self, array: np.ndarray | None) -> np.ndarray | None:
        """A copy of what lies in a worker's shared memory, which goes when the worker does."""
        return np.array(array) if self._workers and array is not None else array

    def _identity(self) -> dict[str, Any]:
        """What decides which batches come."""
        maker = self._maker
        self._fingerprint = self._fingerprint or fingerprint(maker.source)
        return {
            "format": _FORMAT,
            "data": self._fingerprint,
            "records": maker.order.records,
            "rows of a batch": maker.batch_size * maker.process_count,
            "seed": maker.order.seed,
            "shuffle": maker.order.shuffle,
        }

    def _count(self, arrays: dict[str, Any]) -> None:
        if arrays["cut"] and not self.cut:
            _log.warning("Texts are cut to %d tokens, as asked for.", self._maker.length)
        self.cut += arrays["cut"]
        known = {skip.number for skip in self.skipped}
        for number, reason in arrays["skipped"]:
            if number not in known:
                known.add(number)
                skip = Skipped(number, reason)
                self.skipped += (skip,)
                records = self._maker.order.records
                check_skipped(len(self.skipped), records, skip, self._maker.max_bad_records)
                _log.warning(
                    "Left out record %d (%d of %d so far): %s",
                    number, len(self.skipped), records, reason,
                )  # fmt: skip


def _check(
    batch_size: int,
    length: int,
    seed: int,
    epochs: int | None,
    workers: int,
    index: int,
    count: int,
) -> None:
    rules: list[tuple[str, Any, int, Callable[[Any], bool], str]] = [
        ("batch_size", batch_size, 8, lambda value: value >= 1, "At least 1"),
        ("length", length, 128, lambda value: value >= 2, "At least 2"),
        ("seed", seed, 0, lambda value: value >= 0, "A whole number from 0 up"),
        ("epochs", 1 if epochs is None else epochs, 3, lambda value: value >= 1, "At least 1"),
        ("workers", workers, 2, lambda value: value >= 0, "A number from 0 up"),
        ("process_count", count, 1, lambda value: value >= 1, "At least 1"),
        ("process_index", index, 0, lambda value: 0 <= value < count, f"0 to {count - 1}"),
    ]
    for name, value, example, fits, wanted in rules:
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not fits(value):
            raise ConfigError(
                f"{name} is {value!r}. {wanted} fits. Call for example: "
                f"make_batches(..., {name}={example})"
            )
