"""Records -> the arrays of one batch, in whatever process it happens."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from paligemma_jax.data.bad_records import BadRecords, Skipped
from paligemma_jax.data.order import Draw, MixedOrder, Order
from paligemma_jax.data.record import Record, RecordSource, Transform
from paligemma_jax.errors import DatasetError, PaliGemmaError
from paligemma_jax.processing.encoding import Arrays
from paligemma_jax.processing.image_source import load_image
from paligemma_jax.processing.overflow import Overflow
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer

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
    bad_records: BadRecords
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
            self.bad_records.check(different, self.order.records, bad)
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
