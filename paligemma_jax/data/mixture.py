"""Several data sets in one run, each with a weight."""

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from paligemma_jax.data.joined import Joined
from paligemma_jax.data.order import MixedOrder
from paligemma_jax.data.record import Record, RecordSource, Transform, fingerprint
from paligemma_jax.errors import ConfigError, DatasetError

ROUND = 1 << 16  # records, at most, after which parts come in the same sequence again


@dataclasses.dataclass(frozen=True)
class Part:
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
                "part out, or write for example: Part(records, weight=2.0)"
            )
        if isinstance(self.records, Mixture | Part):
            raise ConfigError(
                f"A part holds a {type(self.records).__name__}. A path, a source or a list of "
                "records fits. Put all parts into one mixture: Mixture(Part(a, 3), Part(b, 1))"
            )
        if transforms is not None and not isinstance(transforms, tuple | list):
            raise ConfigError(
                f"The transforms of a part are {transforms!r}. A tuple of them fits. Write for "
                "example: Part(records, transforms=(RandomAnswer(),))"
            )

    def __repr__(self) -> str:
        records, own = self.records, self.transforms
        told = f"{type(records).__name__} of {len(records)}" if _is_rows(records) else repr(records)
        more = "" if own is None else f", transforms={own!r}"
        return f"Part({told}, weight={self.weight!r}{more})"


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Mixture:
    """Data sets to train on together, by weights.

        Mixture(Part("captions.jsonl", 3.0), Part(Data("coco", reader=...), 1.0))

    Three of four records come from the captions then, however many there are. After any number of
    records each part has had its share of them, give or take less than one record. Each part is
    shuffled and gone through by itself, so a small one of large weight comes round more often. An
    epoch of the mixture is as many records as all parts have together.

    A source of records itself: those of all parts one after the other, each once. `make_batches`
    and training draw from it by weight. Weights whose shares are no whole numbers of 65,536 records
    or fewer are rounded to such.

    Raises ConfigError for no parts, what is no `Part`, and a weight too small beside the others.
    """

    parts: tuple[Part, ...] = dataclasses.field(init=False)

    def __init__(self, *parts: Part):
        if not parts:
            raise ConfigError(
                "The mixture has no parts. At least one fits. Write for example: "
                "Mixture(Part(captions, 3.0), Part(boxes, 1.0))"
            )
        for place, part in enumerate(parts):
            if not isinstance(part, Part):
                raise ConfigError(
                    f"Part {place} of the mixture is a {type(part).__name__}. A Part fits. Write "
                    "for example: Mixture(Part(captions, 3.0), Part(boxes, 1.0))"
                )
        object.__setattr__(self, "parts", parts)
        if not all(self.shares):
            small = self.shares.index(0)
            raise ConfigError(
                f"Part {small} of the mixture has the weight {parts[small].weight!r}, less than a "
                f"record of {ROUND:,}. A larger one fits, or no such part. Write for example: "
                f"Part(records, weight={sum(float(part.weight) for part in parts) / 1000:.2g})"
            )

    def __repr__(self) -> str:
        return f"Mixture({', '.join(map(repr, self.parts))})"

    def __len__(self) -> int:
        return len(self._joined)

    def __getitem__(self, index: int) -> Record:
        return self._joined[index]

    @functools.cached_property
    def shares(self) -> tuple[int, ...]:
        """Records of each part in a round of their sum, in smallest whole numbers."""
        # As they are written: 0.1 is a tenth here, which no float is.
        weights = [Fraction(str(float(part.weight))) for part in self.parts]
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
                for place, part in enumerate(self.parts)
            )
        )

    def order(self, seed: int, shuffle: bool) -> MixedOrder:
        """In which order its records come."""
        sizes = tuple(len(source) for source in self.sources)
        return MixedOrder(sizes, self.shares, seed, shuffle)

    def transforms(self, default: Sequence[Transform]) -> tuple[tuple[Transform, ...], ...]:
        """Those of each part; `default` where it has none of its own."""
        own = [part.transforms for part in self.parts]
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
    def _joined(self) -> Joined:
        for place, part in enumerate(self.parts):
            if _is_rows(part.records) or not _has_records(part.records):
                raise DatasetError(
                    f"Part {place} of the mixture, {part!r}, is no source of records yet, or an "
                    "empty one. A source fits. Open it, with open_source(path) or RowSource(list); "
                    "finetune does so itself."
                )
        return Joined(tuple(part.records for part in self.parts))


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
