"""Sources and transforms that worker processes can import."""

import dataclasses

import numpy as np

from paligemma_jax.data.record import Record
from paligemma_jax.errors import DatasetError


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Record i has a grey picture of value i and the answer "i"; those in `bad` are damaged."""

    count: int
    bad: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        if index in self.bad:
            raise DatasetError(f"numbers:{index}: it is damaged.")
        picture = np.full((4, 6, 3), index, np.uint8)
        return Record((picture,), "caption en", f"{index}", f"numbers:{index}")


def add_chance(record: Record, rng: np.random.Generator) -> Record:
    """Adds a random digit to the answer."""
    return dataclasses.replace(record, suffix=f"{record.suffix} {rng.integers(10)}")


def all_ids(batches) -> list[tuple[str, ...]]:
    return [batch.ids for batch in batches]
