"""Records -> batches: shuffled by a seed, divided among processes, and at any place again."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from paligemma_jax.data.bad_records import BadRecords, Skipped, StopAtBadRecord
from paligemma_jax.data.mixture import Mixture
from paligemma_jax.data.order import Order
from paligemma_jax.data.record import RecordSource, Transform, fingerprint
from paligemma_jax.data.rows_of_batch import BatchSource
from paligemma_jax.data.workers import parse_absl_flags, start_worker
from paligemma_jax.errors import ConfigError, DatasetError, MissingExtraError, PaliGemmaError
from paligemma_jax.processing.batch import Batch
from paligemma_jax.processing.overflow import Overflow, Refuse
from paligemma_jax.processing.processor import Processor

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
    bad_records: BadRecords | None = None,
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
      bad_records: `StopAtBadRecord()`, the default, or `SkipBadRecords()`.

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
        bad_records=bad_records or StopAtBadRecord(),
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
                self._maker.bad_records.check(len(self.skipped), records, skip)
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
