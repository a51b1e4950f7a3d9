"""Which record stands where in an endless sequence of records; any place is told on its own."""

import dataclasses
import functools
from typing import Any

import numpy as np


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
