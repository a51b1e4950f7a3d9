"""Several data sets in one run: concatenated, or mixed by weight and shuffled one by one."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from paligemma_jax.data.record import Record, RecordSource, Transform, check_index, fingerprint
from paligemma_jax.errors import ConfigError, DatasetError

_EXAMPLE = "Mixture(MixtureComponent(captions, 3.0), MixtureComponent(boxes, 1.0))"


@dataclasses.dataclass(frozen=True)
class ConcatSource:
    """The records of all sources, one source after another."""

    sources: tuple[RecordSource, ...]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        index = check_index(index, len(self), "several sources")
        which = bisect.bisect_right(self._ends, index)
        return self.sources[which][index - (self._ends[which - 1] if which else 0)]

    def fingerprint(self) -> str:
        """Of all of them."""
        text = " ".join(fingerprint(source) for source in self.sources)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.sources)))


@dataclasses.dataclass(frozen=True)
class MixtureComponent:
    """One data set of a `Mixture`.

    Attributes:
      records: what a run takes as `train`, except a `Mixture`; `make_batches` needs a source.
      weight: how often its records are sampled, relative to the other components; positive.
      transforms: for its records, in place of the run's; None: the run's.
    """

    records: Any
    weight: float = 1.0
    transforms: tuple[Transform, ...] | None = None

    def __post_init__(self) -> None:
        weight, transforms = self.weight, self.transforms
        number = isinstance(weight, int | float | np.number) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(
                "The weight of a mixture component must be a positive, finite number, got "
                f"{weight!r}. Write for example: MixtureComponent(records, weight=2.0)"
            )
        if isinstance(self.records, Mixture | MixtureComponent):
            raise ConfigError(
                "A mixture component takes a path, a source or a list of records, got "
                f"{type(self.records).__name__}. Put all components into one mixture: {_EXAMPLE}"
            )
        if transforms is not None and not isinstance(transforms, tuple | list):
            raise ConfigError(
                f"The transforms of a mixture component must be a tuple, got {transforms!r}. Write "
                "for example: MixtureComponent(records, transforms=(RandomAnswer(),))"
            )

    def __repr__(self) -> str:
        records, own = self.records, self.transforms
        if isinstance(records, list | tuple):
            told = f"{type(records).__name__} of {len(records)}"
        else:
            told = repr(records)
        more = "" if own is None else f", transforms={own!r}"
        return f"MixtureComponent({told}, weight={self.weight!r}{more})"


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Mixture:
    """Data sets to train on together, by weights.

        Mixture(MixtureComponent("captions.jsonl", 3.0), MixtureComponent("coco", 1.0))

    Three of four records then come from the captions, whatever the sizes. Each component is
    shuffled and repeated on its own, so a small one of large weight repeats more often. An epoch of
    the mixture is as many records as all components have together. grain does the mixing; weights
    are followed to within 1 %.

    A mixture of sources is a source too: the records of all components, one component after
    another. `make_batches` and training sample it by weight.

    Raises ConfigError for no components, and for anything else than components.
    """

    components: tuple[MixtureComponent, ...] = dataclasses.field(init=False)

    def __init__(self, *components: MixtureComponent):
        wrong = [c for c in components if not isinstance(c, MixtureComponent)]
        if wrong or not components:
            got = f"a {type(wrong[0]).__name__}" if wrong else "no components"
            raise ConfigError(
                f"A mixture takes MixtureComponents, got {got}. Write for example: {_EXAMPLE}"
            )
        object.__setattr__(self, "components", components)

    def __repr__(self) -> str:
        return f"Mixture({', '.join(map(repr, self.components))})"

    def __len__(self) -> int:
        return len(self._concatenated)

    def __getitem__(self, index: int) -> Record:
        return self._concatenated[index]

    @property
    def fractions(self) -> tuple[float, ...]:
        """The fraction of sampled records that comes from each component."""
        total = sum(float(component.weight) for component in self.components)
        return tuple(float(component.weight) / total for component in self.components)

    @property
    def sources(self) -> tuple[RecordSource, ...]:
        """Those of the components; DatasetError where one is no source yet, or empty."""
        return self._concatenated.sources

    def opened(self, open_one: Callable[[Any, int], RecordSource]) -> "Mixture":
        """The mixture with the sources that `open_one` makes of each component's records."""
        return Mixture(
            *(
                dataclasses.replace(component, records=open_one(component.records, number))
                for number, component in enumerate(self.components)
            )
        )

    def titles(self) -> list[str]:
        """A description of each component: its fraction, and how often its records repeat."""
        return [
            f"component {number}, {fraction:.1%} of the samples, each record "
            f"{fraction * len(self) / len(source):.3g} times an epoch"
            for number, (fraction, source) in enumerate(
                zip(self.fractions, self.sources, strict=True)
            )
        ]

    def fingerprint(self) -> str:
        """Of all components and their fractions."""
        text = " ".join(
            f"{fraction:.9g} {fingerprint(source)}"
            for fraction, source in zip(self.fractions, self.sources, strict=True)
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @functools.cached_property
    def _concatenated(self) -> ConcatSource:
        for number, component in enumerate(self.components):
            records = component.records
            source = isinstance(records, RecordSource) and not isinstance(
                records, list | tuple | str | os.PathLike
            )
            if not source or not len(records):
                raise DatasetError(
                    f"Component {number} of the mixture must be a source with records, got "
                    f"{component!r}. Open it with open_source(path) or SequenceSource(list)"
                )
        return ConcatSource(tuple(component.records for component in self.components))


class Sample(NamedTuple):
    """The number of a record in its source, how often its component was repeated, and which."""

    number: int
    epoch: int
    component: int


@dataclasses.dataclass(frozen=True)
class Sampler:
    """An endless sequence of samples with random access, so that any position can be resumed.

    Components of the given sizes lie one after another in the source. Each is repeated, shuffled
    anew each time, and they are mixed by weight.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    shuffle: bool

    @classmethod
    def of(cls, source: RecordSource, seed: int, shuffle: bool) -> "Sampler":
        """The one of a source; a `Mixture` is sampled by weight."""
        if isinstance(source, Mixture):
            return cls(tuple(map(len, source.sources)), source.fractions, seed, shuffle)
        return cls((len(source),), (1.0,), seed, shuffle)

    @property
    def records(self) -> int:
        """Those of all components."""
        return sum(self.sizes)

    def __getitem__(self, position: int) -> Sample:
        return self._samples[position]

    def replacement(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """A random record of the same component, in place of one that cannot be used."""
        size, start = self.sizes[sample.component], sum(self.sizes[: sample.component])
        return sample._replace(number=start + int(rng.integers(size)))

    @functools.cached_property
    def _samples(self) -> Any:
        import grain

        components = []
        for component, size in enumerate(self.sizes):
            start = sum(self.sizes[:component])
            indices = grain.MapDataset.range(start, start + size)
            if self.shuffle:
                # Hashed: grain adds the epoch, so neighboring seeds would share their orders.
                (seed,) = np.random.SeedSequence([self.seed, component]).generate_state(1)
                indices = indices.shuffle(seed=int(seed))
            to_sample = functools.partial(_to_sample, size, component)
            components.append(indices.repeat().map_with_index(to_sample))
        return grain.MapDataset.mix(components, self.weights)


def _to_sample(size: int, component: int, position: int, index: int) -> Sample:
    return Sample(int(index), position // size, component)


def component_transforms(
    source: RecordSource, default: Sequence[Transform]
) -> tuple[tuple[Transform, ...], ...]:
    """The transforms of each component; `default` for those without their own."""
    if not isinstance(source, Mixture):
        return (tuple(default),)
    own = [component.transforms for component in source.components]
    return tuple(tuple(default if one is None else one) for one in own)
