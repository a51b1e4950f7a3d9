"""Several sources of records, one after the other."""

import bisect
import dataclasses
import functools
import hashlib
import itertools

from paligemma_jax.data.record import Record, RecordSource, check_number, fingerprint


@dataclasses.dataclass(frozen=True)
class Joined:
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
