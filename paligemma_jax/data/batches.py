"""Records -> batches to train on: shuffled by a seed, divided among processes, resumable anywhere.

grain shuffles, mixes and reads ahead; a batch is a function of its number alone, so that neither
workers nor a restart change it. Letters: B examples, N images an example, S pixels, T text tokens.
"""

import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.data.mixture import Mixture, Sample, Sampler, component_transforms
from paligemma_jax.data.record import RecordSource, Transform, fingerprint
from paligemma_jax.errors import ConfigError, DatasetError, MissingExtraError, PaliGemmaError
from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.processor import Arrays, Batch, Overflow, Processor
from paligemma_jax.processing.tokenizer import Tokenizer

_ENDLESS = 1 << 40  # batches
_READ_AHEAD = 2  # batches, of each worker
_MOST_REPLACEMENTS = 64  # of one bad record, one after another
_STATE_VERSION = 1
_ARRAYS = ("images", "tokens", "mask_ar", "mask_input", "mask_loss")
_log = logging.getLogger(__name__)

# Images f32[N, S, S, 3], tokens and masks, id.
EncodedExample = tuple[np.ndarray | None, Arrays, str]


@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Arrays to train on, numpy's, and the ids of the records they come from.

    `batch.images` is f32[B, N, S, S, 3] or None; tokens, mask_ar and mask_loss are i32[B, T + 1]
    and mask_input bool[B, T + 1], as `Processor.encode_train(prefix, suffix, T)` gives them: all
    but the last are inputs, all but the first are targets.
    """

    batch: Batch
    ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SkippedRecord:
    """A record that was skipped: its index in the source, and what was wrong with it."""

    index: int
    reason: str


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
    on_overflow: Overflow = "error",
    max_bad_fraction: float = 0.0,
) -> "Batches":
    """An iterator of `TrainBatch`.

    The batches depend on nothing but the source, the transforms, `seed` and the size of the global
    batch: not on `workers`, nor on how the batch is divided among processes. Epochs follow one
    another without a gap, and records that do not fill the last batch are dropped.

    Args:
      source: the records; those of a `Mixture` are sampled by its weights.
      processor: makes arrays of images and texts.
      batch_size: examples of this process's shard of a batch.
      length: T, tokens of prompt and answer; for longer ones see `on_overflow`.
      seed: from 0 up; of the order and of the transforms.
      transforms: change each record, in turn, except those of a component that has its own; must be
        picklable if there are workers.
      shuffle: each epoch in its own order; otherwise in that of the source.
      epochs: how often each record comes, or as many records of a `Mixture`; None: no end.
      workers: processes that read ahead; with 0, threads of this one do. A script that asks for any
        must keep its own work under `if __name__ == "__main__":`.
      process_index, process_count: which shard of each batch this process reads.
      on_overflow: "error" makes a text that is too long a bad record, "truncate" cuts it.
      max_bad_fraction: fraction of the records that may be unusable; such are skipped and logged,
        and one may always be. 0.0: the first one is an error.

    Raises:
      MissingExtraError: without grain.
      ConfigError: for numbers out of range.
      DatasetError: for fewer records than a batch needs; while iterating, for bad records.
    """
    bounds: list[tuple[str, Any, int, float]] = [
        ("batch_size", batch_size, 1, np.inf),
        ("length", length, 2, np.inf),
        ("seed", seed, 0, np.inf),
        ("epochs", 1 if epochs is None else epochs, 1, np.inf),
        ("workers", workers, 0, np.inf),
        ("process_count", process_count, 1, np.inf),
        ("process_index", process_index, 0, process_count - 1),
    ]
    for name, value, low, high in bounds:
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            limit = "up" if high == np.inf else f"to {high}"
            raise ConfigError(f"{name} must be a whole number from {low} {limit}, got {value!r}")
    if not 0 <= max_bad_fraction < 1:
        raise ConfigError(
            f"expected max_bad_fraction as a fraction from 0 to below 1, got {max_bad_fraction}"
        )
    try:
        import grain  # noqa: F401
    except ImportError as e:
        raise MissingExtraError("Reading training data", "data") from e
    global_batch = batch_size * process_count
    batches = _ENDLESS if epochs is None else len(source) * epochs // global_batch
    # Records of a small component may come twice in a batch.
    if not batches or (len(source) < global_batch and not isinstance(source, Mixture)):
        raise DatasetError(
            f"expected at least {global_batch} records, one full batch, got {len(source)}. "
            f"Set batch_size to at most {max(1, len(source) // process_count)}"
        )
    reader = BatchReader(
        source, processor, Sampler.of(source, seed, shuffle),
        component_transforms(source, transforms), batch_size, length, on_overflow,
        max_bad_fraction, process_index, process_count, batches,
    )  # fmt: skip
    return Batches(reader, workers)


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """The batches of this process by number: what grain reads.

    Batch b of all P processes together holds the samples b * P * B .. (b + 1) * P * B, and process
    p the p-th contiguous shard of them. Random numbers derive from a sample's position too.
    `transforms` are those of each component.
    """

    source: RecordSource
    processor: Processor
    sampler: Sampler
    transforms: tuple[tuple[Transform, ...], ...]
    batch_size: int
    length: int
    on_overflow: Overflow
    max_bad_fraction: float
    process_index: int
    process_count: int
    batches: int

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> dict[str, Any]:
        first = (number * self.process_count + self.process_index) * self.batch_size
        skipped: list[SkippedRecord] = []
        examples = [self._example(first + i, skipped) for i in range(self.batch_size)]
        images, texts, ids = zip(*examples, strict=True)
        tokens, mask_ar, mask_loss = (
            np.stack([text[name] for text in texts]) for name in ("text", "mask_ar", "mask_loss")
        )
        last = tokens[:, -1]
        return {
            "images": _stack(images, ids),
            "tokens": tokens,
            "mask_ar": mask_ar,
            "mask_input": (mask_ar == 0) | (mask_loss == 1),
            "mask_loss": mask_loss,
            "ids": list(ids),
            "skipped": [(one.index, one.reason) for one in skipped],
            # Tokens without padding end in eos, unless they were truncated.
            "truncated": bool(np.any((last != Tokenizer.pad_id) & (last != Tokenizer.eos_id))),
        }

    def check_skipped(self, skipped: int, last: SkippedRecord) -> None:
        """Raises DatasetError if so many different records are too many to skip."""
        records, most = self.sampler.records, self.max_bad_fraction
        if skipped > (max(1, most * records) if most else 0):
            count = f"{skipped} of {records} records" if most else f"Record {last.index}"
            more = f", more than {most:.1%}; the last" if most else ""
            raise DatasetError(
                f"{count} cannot be used{more}: {last.reason} List all with: paligemma "
                "train --check-data DATA; or skip them: max_bad_fraction="
                f"{min(0.99, max(0.01, 2 * skipped / records)):.2g}"
            )

    def _example(self, position: int, skipped: list[SkippedRecord]) -> EncodedExample:
        sample = self.sampler[position]
        rng = None
        for _ in range(_MOST_REPLACEMENTS):
            try:
                return self._encode(sample, position)
            except PaliGemmaError as e:
                bad = SkippedRecord(sample.number, str(e))
            except OSError as e:
                bad = SkippedRecord(sample.number, f"{e.strerror or e}: {e.filename}")
            skipped.append(bad)
            # Checked here too, or a source of bad records only would be read as a whole.
            self.check_skipped(len({one.index for one in skipped}), bad)
            rng = rng or np.random.default_rng([self.sampler.seed, position, 1])
            sample = self.sampler.replacement(sample, rng)
        raise DatasetError(
            f"{_MOST_REPLACEMENTS} records one after another cannot be used; the last: "
            f"{skipped[-1].reason} List all such records with: paligemma train --check-data DATA"
        )

    def _encode(self, sample: Sample, position: int) -> EncodedExample:
        record = dataclasses.replace(self.source[sample.number], epoch=sample.epoch)
        rng = np.random.default_rng([self.sampler.seed, position])
        try:
            if record.size is not None:
                record = dataclasses.replace(record, images=_load(record.images, record.size))
            for transform in self.transforms[sample.component]:
                record = transform(record, rng)
            if len(record.answers) > 1:
                raise DatasetError(
                    f"expected one answer after the transforms, got {len(record.answers)}. Choose "
                    "one with transforms=(RandomAnswer(),)"
                )
            texts = self.processor.encode_train(
                record.prefix, record.suffix, self.length, self.on_overflow
            )
            images = [self.processor.image(image) for image in record.images]
        except PaliGemmaError as e:
            told = str(e).removeprefix(f"{record.id}: ")
            raise DatasetError(f"{record.id}: {told}") from e
        return (np.stack(images) if images else None), texts, record.id


def _load(sources: Sequence[ImageSource], size: tuple[int, int]) -> tuple[Image.Image, ...]:
    """The images; DatasetError if one is of another size."""
    images = tuple(load_image(image) for image in sources)
    for image in images:
        if image.size != size:
            raise DatasetError(
                f"expected an image of {size[0]} x {size[1]} pixels, as its boxes are, got "
                f"{image.width} x {image.height}. Correct the data, or save the image upright, "
                "without EXIF orientation."
            )
    return images


def _stack(images: Sequence[np.ndarray | None], ids: Sequence[str]) -> np.ndarray | None:
    counts = [0 if one is None else len(one) for one in images]
    for count, name in zip(counts, ids, strict=True):
        if count != counts[0]:
            raise DatasetError(
                "All records of a batch must have the same number of images, got "
                f"{counts[0]} ({ids[0]}) and {count} ({name}). Train on one kind of record, or "
                "repeat images."
            )
    stacked = [one for one in images if one is not None]
    return np.stack(stacked) if stacked else None


class Batches(Iterator[TrainBatch]):
    """What `make_batches` gives. Its position can be saved and restored, bit for bit.

    Attributes:
      skipped: bad records so far, each once.
    """

    def __init__(self, reader: BatchReader, workers: int):
        self._reader = reader
        self._workers = workers
        self._next = 0
        self._iterator: Any = None
        self._fingerprint: str | None = None
        self._told_truncated = False
        self.skipped: tuple[SkippedRecord, ...] = ()

    def __len__(self) -> int:
        """Batches in all; a very large number where there is no end."""
        return len(self._reader)

    @property
    def position(self) -> int:
        """The number of the batch that comes next."""
        return self._next

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> TrainBatch:
        if self._next >= len(self._reader):
            self.close()
            raise StopIteration
        if self._iterator is None:
            self._iterator = self._open()
        try:
            arrays = next(self._iterator)
        except BaseException as e:
            self.close()
            if isinstance(e, PaliGemmaError):
                e.__notes__ = []  # grain's, about its own frames
            elif isinstance(e, RuntimeError) and "Worker process was terminated" in str(e):
                raise DatasetError(
                    "A worker process that reads data was killed; often memory ran out. Start "
                    "again from the last checkpoint with fewer: workers=1"
                ) from e
            raise
        self._tell(arrays)
        self._next += 1
        batch: dict[str, Any] = {name: self._own(arrays[name]) for name in _ARRAYS}
        return TrainBatch(Batch(**batch), tuple(arrays["ids"]))

    def state(self) -> bytes:
        """The position behind the last batch that was given, for `restore`."""
        skipped = [[one.index, one.reason] for one in self.skipped]
        return json.dumps(self._identity() | {"batch": self._next, "skipped": skipped}).encode()

    def restore(self, state: bytes) -> None:
        """Continues behind a saved position; the batches are those that would have come.

        Raises DatasetError, naming every difference, if the state is of other data, another seed,
        or another global batch size.
        """
        try:
            values = json.loads(state)
            batch, skipped = values["batch"], values["skipped"]
        except (ValueError, KeyError, TypeError) as e:
            raise DatasetError(
                "The saved position in the data is damaged. Resume from an earlier checkpoint."
            ) from e
        differences = [
            f"{name} is {mine!r}, and was {values.get(name)!r}"
            for name, mine in self._identity().items()
            if values.get(name) != mine
        ]
        if differences:
            raise DatasetError(
                f"The saved position is of other data: {'; '.join(differences)}. Resume with the "
                "same data, seed and global batch size, and any number of workers and processes."
            )
        self.close()
        self._next = batch
        self.skipped = tuple(SkippedRecord(index, reason) for index, reason in skipped)

    def close(self) -> None:
        """Ends threads and processes that read ahead; iterating on starts them again."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Any:
        import grain

        options = grain.ReadOptions(
            num_threads=1 if self._workers else 2, prefetch_buffer_size=_READ_AHEAD
        )
        reader: Any = self._reader
        data: Any = grain.MapDataset.source(reader)[self._next :].to_iter_dataset(options)
        if self._workers:
            _parse_absl_flags()
            data = data.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_READ_AHEAD),
                worker_init_fn=_start_worker,
            )
        return iter(data)

    def _own(self, array: np.ndarray | None) -> np.ndarray | None:
        """A copy of what lies in a worker's shared memory, which goes when the worker does."""
        return np.array(array) if self._workers and array is not None else array

    def _identity(self) -> dict[str, Any]:
        """What decides which batches come."""
        reader = self._reader
        self._fingerprint = self._fingerprint or fingerprint(reader.source)
        return {
            "version": _STATE_VERSION,
            "data": self._fingerprint,
            "records": reader.sampler.records,
            "global_batch_size": reader.batch_size * reader.process_count,
            "seed": reader.sampler.seed,
            "shuffle": reader.sampler.shuffle,
        }

    def _tell(self, arrays: dict[str, Any]) -> None:
        """Logs what was truncated and skipped, and stops where too much was."""
        if arrays["truncated"] and not self._told_truncated:
            self._told_truncated = True
            _log.warning("Texts are truncated to %d tokens.", self._reader.length)
        for index, reason in arrays["skipped"]:
            if all(index != known.index for known in self.skipped):
                bad = SkippedRecord(index, reason)
                self.skipped += (bad,)
                self._reader.check_skipped(len(self.skipped), bad)
                count, records = len(self.skipped), self._reader.sampler.records
                _log.warning(
                    "Skipped record %d (%d of %d so far): %s", index, count, records, reason
                )


def _start_worker(index: int, count: int) -> None:
    """Runs first in each process that reads data."""
    # Whoever uses jax here must not take the accelerator's memory. If it is imported already, as by
    # what is read here, it no longer looks at the environment.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # Ctrl-C goes to all processes of a terminal; the trainer decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Otherwise a killed trainer would leave its workers running for ever.
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()


def _exit_with(parent: int) -> None:
    """Ends this process once `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _parse_absl_flags() -> None:
    """grain asks absl for its flags, which nobody has parsed in a program that uses none."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
