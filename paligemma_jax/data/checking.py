"""A check of data before training: everything that is wrong with it, at once."""

import collections
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paligemma_jax.data.contact_sheet import contact_sheet
from paligemma_jax.data.dataset_report import DatasetReport, SplitReport
from paligemma_jax.data.image_folder import ImageFolder
from paligemma_jax.data.inspection import Inspected, Inspector, Progress, repeated
from paligemma_jax.data.mixture import Mixture
from paligemma_jax.data.opening import find_splits, open_source
from paligemma_jax.data.problem import Kind, Problem
from paligemma_jax.data.readers import Reader
from paligemma_jax.data.record import Record, RecordSource, Transform
from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.processor import Processor

_SAMPLES = 12


def check(
    path_or_source: str | os.PathLike[str] | RecordSource,
    processor: Processor | None = None,
    length: int | None = None,
    *,
    images: str | os.PathLike[str] | ImageFolder | None = None,
    reader: Reader | None = None,
    codec: MaskCodec | None = None,
    transforms: Sequence[Transform] = (),
    sheet: str | os.PathLike[str] | None = None,
    most_pictures: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> DatasetReport:
    """Checks every split at a path, one source, or every part of a `Mixture`.

    Args:
      path_or_source: a path as for `open_source`, or a source, such as a mixture of sources.
      processor: counts tokens; without, they are not.
      length: T of `make_batches`, to say what does not fit.
      images, reader, codec: as for `open_source`; the codec also draws masks.
      transforms: applied before tokens are counted and samples drawn; parts may have their own.
      sheet: PNG to write the contact sheet to.
      most_pictures: records whose pictures are opened, spread over the data; all if None.
      seed: of the samples and the transforms.
      progress: called with records done and records in all.

    Raises DatasetError only where there is no data to check.
    """
    changes = [tuple(transforms)]
    if isinstance(path_or_source, str | os.PathLike):
        path = Path(path_or_source)
        sources = {
            name: open_source(path, name or "train", images=images, reader=reader, codec=codec)
            for name in find_splits(path)
        }
        changes *= len(sources)
    elif isinstance(path_or_source, Mixture):
        titles = path_or_source.titles()
        sources = dict(zip(titles, path_or_source.sources, strict=True))
        changes = path_or_source.transforms(transforms)
    else:
        sources = {"": path_or_source}
    reports: list[SplitReport] = []
    samples: list[Record] = []
    seen: dict[str, tuple[str, str]] = {}  # picture -> split and place of the first
    for (name, source), own in zip(sources.items(), changes, strict=True):
        opened = _chosen(len(source), most_pictures)
        inspector = Inspector(
            source, processor, length, own, seed, lambda i, opened=opened: i in opened
        )
        found = inspector.all(progress)
        # Parts of a mixture may well ask different things about the same pictures.
        shared = () if isinstance(path_or_source, Mixture) else _shared(name, found, seen)
        reports.append(_report(name, source, found, length, shared))
        samples += _samples(source, inspector, found, -(-_SAMPLES // len(sources)), seed)
    page = contact_sheet(samples, codec) if samples else None
    path = None if sheet is None else Path(sheet)
    report = DatasetReport(tuple(reports), page, path)
    if path is not None:
        report.save_sheet(path)
    return report


def check_dataset(source: RecordSource, processor: Processor, length: int) -> DatasetReport:
    """`check` of one source, with tokens."""
    return check(source, processor, length)


def _chosen(count: int, most: int | None) -> set[int] | range:
    if most is None or most >= count:
        return range(count)
    return set(np.linspace(0, count - 1, most).round().astype(int).tolist())


def _report(
    name: str,
    source: RecordSource,
    found: Sequence[Inspected],
    length: int | None,
    shared: Sequence[Problem],
) -> SplitReport:
    problems = list(getattr(source, "problems", ()))
    problems += [problem for one in found for problem in one.problems]
    labels = collections.Counter(label for one in found for label in one.labels)
    return SplitReport(
        name=name,
        source=repr(source),
        records=len(source),
        opened=len({picture for one in found for picture in one.pictures}),
        problems=(*problems, *repeated(found), *shared),
        labels=dict(labels.most_common()),
        tokens=np.array([one.tokens for one in found if one.tokens is not None], np.int32),
        length=length,
    )


def _shared(
    name: str, found: Sequence[Inspected], seen: dict[str, tuple[str, str]]
) -> list[Problem]:
    """Pictures that an earlier split has; adds those of this one to `seen`."""
    problems = []
    for one in found:
        for picture in one.pictures:
            split, place = seen.setdefault(picture, (name, one.place))
            if split != name:
                problems.append(Problem(Kind.SHARED, one.place, f"its picture is that of {place}"))
    return problems


def _samples(
    source: RecordSource, inspector: Inspector, found: Sequence[Inspected], count: int, seed: int
) -> list[Record]:
    """Records that can be read, drawn at random, in order."""
    stopping = {
        one.number for one in found for problem in one.problems if problem.kind.stops_training
        and problem.kind is not Kind.LONG
    }  # fmt: skip
    good = [one.number for one in found if one.number not in stopping]
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.permutation(len(good))[: 4 * count].tolist())
    samples: list[Record] = []
    for place in rng.permutation(chosen).tolist():
        if len(samples) < count:
            try:
                record = inspector.changed(good[place], source[good[place]])
                contact_sheet([record])  # pictures that were not opened before may be broken
            except (PaliGemmaError, OSError):
                continue
            samples.append(record)
    return samples
