"""What training does about records that cannot be used."""

import dataclasses
from typing import Protocol, runtime_checkable

from paligemma_jax.errors import DatasetError


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that was left out: its number in the source, and what was wrong with it."""

    number: int
    reason: str


@runtime_checkable
class BadRecords(Protocol):
    """Policy for records that cannot be used."""

    def check(self, skipped: int, records: int, last: Skipped) -> None:
        """Raises DatasetError if `skipped` different records of `records` are too many."""
        ...


@dataclasses.dataclass(frozen=True)
class StopAtBadRecord:
    """The first one stops training with a DatasetError; the default."""

    def check(self, skipped: int, records: int, last: Skipped) -> None:
        raise DatasetError(
            f"Record {last.number} of {records} cannot be used: {last.reason} "
            "See all such records with: paligemma train --check DATA; "
            "or leave a few out knowingly: bad_records=SkipBadRecords()"
        )


@dataclasses.dataclass(frozen=True)
class SkipBadRecords:
    """Others take their place, each is counted and logged, and too many stop training.

    `most` is the part of the source's records that may be bad; one always may.
    """

    most: float = 0.01

    def check(self, skipped: int, records: int, last: Skipped) -> None:
        if skipped > max(1, self.most * records):
            raise DatasetError(
                f"{skipped} of {records} records cannot be used, more than {self.most:.1%}. The "
                f"last is number {last.number}: {last.reason} "
                "Mend the data (paligemma train --check DATA lists all), or allow more: "
                f"bad_records=SkipBadRecords(most={min(1.0, 2 * skipped / records):.2g})"
            )
