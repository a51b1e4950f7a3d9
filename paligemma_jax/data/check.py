"""`paligemma train --check-data`: everything that is wrong with data, and a sheet of samples.

One pass over each split: every record is read, its images are opened, its answer is parsed, and its
tokens are counted. Nothing that is wrong with a record stops the check.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from paligemma_jax.data.contact_sheet import Panel, contact_sheet
from paligemma_jax.data.mixture import Mixture, component_transforms
from paligemma_jax.data.readers import Reader
from paligemma_jax.data.record import (
    ImageFolder,
    Problem,
    ProblemKind,
    Record,
    RecordSource,
    Transform,
)
from paligemma_jax.data.sources import find_splits, open_source
from paligemma_jax.data.transforms import OBJECT_PROMPT
from paligemma_jax.drawing import INK
from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.location_tokens import parse_answer
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.prompts import split_labels

_THREADS = 4
_SAMPLES = 12
_SHOWN_PROBLEMS = 10  # of one kind
_SHOWN_LABELS = 20
_MALFORMED_TOKEN = re.compile(r"<(loc|seg)[^>]*>")

Progress = Callable[[int, int], None]  # records done, records in all


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """What was found in one split, or one component of a mixture.

    Attributes:
      name: of the split, or which component it is; "" if there is but one.
      source: what was read.
      records: how many there are.
      images: different images that were opened.
      problems: all that were found.
      labels: objects of each label, the most frequent first.
      tokens: of each readable record, i32[n]; prompt, answer, bos, newline and eos.
      length: T; a record of more than T + 1 tokens is too long. None if not given.
    """

    name: str
    source: str
    records: int
    images: int
    problems: tuple[Problem, ...]
    labels: Mapping[str, int]
    tokens: np.ndarray
    length: int | None


@dataclasses.dataclass(frozen=True)
class DatasetReport:
    """All splits, and an image of samples with their targets drawn; `str()` is for people."""

    splits: tuple[SplitReport, ...]
    sheet: Image.Image | None = None
    sheet_path: Path | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Those of all splits."""
        return tuple(problem for split in self.splits for problem in split.problems)

    @property
    def ok(self) -> bool:
        """Whether training would go through all records without stopping or skipping."""
        return not any(problem.kind.stops_training for problem in self.problems)

    def __str__(self) -> str:
        lines = [line for split in self.splits for line in _split_lines(split)]
        if self.sheet_path is not None and self.sheet is not None:
            lines.append(f"Samples with their targets: {self.sheet_path}")
        stopping = sum(problem.kind.stops_training for problem in self.problems)
        if stopping:
            lines.append(f"Training would stop: {stopping:,} problems of the kinds marked with *.")
        elif self.problems:
            lines.append(f"Training would run; {len(self.problems):,} warnings.")
        else:
            lines.append("No problems found.")
        return "\n".join(lines)


def check_data(
    path_or_source: str | os.PathLike[str] | RecordSource,
    processor: Processor | None = None,
    length: int | None = None,
    *,
    images: str | os.PathLike[str] | ImageFolder | None = None,
    reader: Reader | None = None,
    codec: MaskCodec | None = None,
    transforms: Sequence[Transform] = (),
    sheet: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> DatasetReport:
    """Checks every split at a path, one source, or every component of a `Mixture`.

    Args:
      path_or_source: a path as for `open_source`, or a source, such as a mixture of sources.
      processor: counts tokens; without, they are not.
      length: T of `make_batches`, to say what is too long.
      images, reader, codec: as for `open_source`; the codec also draws masks.
      transforms: applied before tokens are counted and samples drawn; components may have their
        own.
      sheet: PNG to write samples with their targets to.
      progress: called with records done and records in all.

    Raises DatasetError only where there is no data to check.
    """
    own = None
    if isinstance(path_or_source, str | os.PathLike):
        sources = {
            name: open_source(
                path_or_source, name or "train", images=images, reader=reader, codec=codec
            )
            for name in find_splits(path_or_source)
        }
    elif isinstance(path_or_source, Mixture):
        sources = dict(zip(path_or_source.titles(), path_or_source.sources, strict=True))
        own = component_transforms(path_or_source, transforms)
    else:
        sources = {"": path_or_source}
    reports, samples = [], []
    first_use: dict[str, tuple[str, str]] = {}  # image -> split and place of its first use
    for number, (name, source) in enumerate(sources.items()):
        inspector = _Inspector(source, processor, length, own[number] if own else transforms)
        found = inspector.all(progress)
        problems = [*getattr(source, "problems", ()), *(p for one in found for p in one.problems)]
        problems += _duplicates(found)
        if own is None:  # components may well ask different things about the same images
            problems += _shared(name, found, first_use)
        labels = collections.Counter(label for one in found for label in one.labels)
        reports.append(
            SplitReport(
                name=name,
                source=repr(source),
                records=len(source),
                images=len({image for one in found for image in one.images}),
                problems=tuple(problems),
                labels=dict(labels.most_common()),
                tokens=np.array([one.tokens for one in found if one.tokens is not None], np.int32),
                length=length,
            )
        )
        samples += inspector.samples(found, -(-_SAMPLES // len(sources)))
    path = None if sheet is None else Path(sheet)
    panels = [
        Panel(
            one.images, one.suffix, ((one.prefix, INK), (f"-> {one.suffix}", INK), (one.id, "gray"))
        )
        for one in samples
    ]
    report = DatasetReport(tuple(reports), contact_sheet(panels, codec) if panels else None, path)
    if path is not None and report.sheet is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        report.sheet.save(part, "PNG")
        os.replace(part, path)
    return report


@dataclasses.dataclass(frozen=True)
class _Inspected:
    """What one record is like: `where` names it, `images` are checksums of pixels."""

    index: int
    where: str
    problems: tuple[Problem, ...]
    labels: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    key: str = ""  # equal for records that are the same
    tokens: int | None = None


class _OpenedImage(NamedTuple):
    checksum: str
    size: tuple[int, int]
    error: str = ""


@dataclasses.dataclass(frozen=True)
class _Inspector:
    """Looks at the records of a source."""

    _source: RecordSource
    _processor: Processor | None
    _length: int | None
    _transforms: Sequence[Transform]
    _opened: dict[str, _OpenedImage] = dataclasses.field(default_factory=dict)

    def all(self, progress: Progress | None) -> list[_Inspected]:
        """Every record, in order."""
        found = []
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for one in pool.map(self._inspect, range(len(self._source))):
                found.append(one)
                if progress is not None:
                    progress(len(found), len(self._source))
        return found

    def samples(self, found: Sequence[_Inspected], count: int) -> list[Record]:
        """Random records that can be trained on, after the transforms."""
        good = [
            one.index
            for one in found
            if not any(p.kind.stops_training and p.kind.name != "TOO_LONG" for p in one.problems)
        ]
        order = np.random.default_rng(0).permutation(len(good))[:count]
        return [self._transformed(good[i], self._source[good[i]]) for i in sorted(order.tolist())]

    def _inspect(self, index: int) -> _Inspected:
        where = f"record {index}"
        try:
            record = self._source[index]
            where = record.id
            problems = _text_problems(record)
            opened = [self._open(image) for image in record.images]
            for image in opened:
                if image.error:
                    problems.append(Problem(ProblemKind.IMAGE, where, image.error))
                elif record.size is not None and image.size != record.size:
                    found, expected = ("{} x {}".format(*s) for s in (image.size, record.size))
                    text = f"it is {found}, and the data says {expected}"
                    problems.append(Problem(ProblemKind.SIZE, where, text))
            if any(image.error for image in opened):
                return _Inspected(index, where, tuple(problems))
            tokens = self._count_tokens(self._transformed(index, record))
        except (PaliGemmaError, OSError) as e:
            return _Inspected(index, where, (Problem(ProblemKind.UNREADABLE, where, str(e)),))
        if tokens is not None and self._length is not None and tokens > self._length + 1:
            text = f"{tokens} tokens, at most {self._length + 1}"
            problems.append(Problem(ProblemKind.TOO_LONG, where, text))
        images = tuple(image.checksum for image in opened)
        return _Inspected(
            index=index,
            where=where,
            problems=tuple(problems),
            labels=tuple(thing.label for thing in parse_answer(record.suffix).objects),
            images=images,
            key=repr((images, record.prefix, record.suffix, record.answers)),
            tokens=tokens,
        )

    def _transformed(self, index: int, record: Record) -> Record:
        rng = np.random.default_rng([0, index])
        for transform in self._transforms:
            record = transform(record, rng)
        return record

    def _open(self, image: ImageSource) -> _OpenedImage:
        path = os.fsdecode(image) if isinstance(image, str | os.PathLike) else None
        opened = None if path is None else self._opened.get(path)
        if opened is None:
            opened = _open(image)
            if path is not None:
                self._opened[path] = opened
        return opened

    def _count_tokens(self, record: Record) -> int | None:
        if self._processor is None:
            return None
        tokenizer = self._processor.tokenizer
        answers = record.answers or (record.suffix,)
        longest = max(len(tokenizer.encode(answer)) for answer in answers)
        return len(self._processor.prompt_ids(record.prefix)) + longest + 1


def _open(image: ImageSource) -> _OpenedImage:
    try:
        pixels = load_image(image)
    except PaliGemmaError as e:
        return _OpenedImage("", (0, 0), str(e))
    except OSError as e:
        return _OpenedImage("", (0, 0), f"{e.strerror or e}")
    checksum = hashlib.blake2b(repr(pixels.size).encode(), digest_size=16)
    checksum.update(pixels.tobytes())
    return _OpenedImage(checksum.hexdigest(), pixels.size)


def _text_problems(record: Record) -> list[Problem]:
    problems = []

    def add(kind: ProblemKind, text: str) -> None:
        problems.append(Problem(kind, record.id, text))

    prompt, asked = record.prefix, OBJECT_PROMPT.fullmatch(record.prefix)
    if prompt != prompt.strip():
        add(ProblemKind.WHITESPACE, f"the prompt {prompt[-40:]!r}; its newline is added by itself")
    for answer in record.answers or (record.suffix,):
        if not answer.strip():
            add(ProblemKind.EMPTY, f"{prompt[:60]!r} has no answer")
        elif answer != answer.strip():
            add(ProblemKind.WHITESPACE, f"the answer {answer[-40:]!r}")
        if "<loc" not in answer and "<seg" not in answer:
            if asked and answer.strip():
                add(ProblemKind.BOX, f"{answer[:60]!r} answers {asked[1]} without a box")
            continue
        parsed = parse_answer(answer)
        for piece in parsed.unparsed:
            add(ProblemKind.BOX, f"{piece.text[:60]!r}: {piece.reason}")
        try:
            labels = split_labels(asked[2]) if asked else ()
        except PaliGemmaError as e:
            add(ProblemKind.LABEL, f"the prompt {prompt[:60]!r}: {e}")
            labels = ()
        for thing in parsed.objects:
            if token := _MALFORMED_TOKEN.search(thing.label):
                add(ProblemKind.BOX, f"{token[0]!r} is out of range or out of place")
            elif labels and thing.label not in labels:
                add(ProblemKind.LABEL, f"{thing.label!r} is not among {', '.join(labels)[:60]}")
            if thing.y1 == thing.y2 or thing.x1 == thing.x2:
                add(ProblemKind.BOX, f"the box of {thing.label!r} has no area")
            if asked and asked[1] == "segment" and thing.codes is None:
                add(ProblemKind.BOX, f"{thing.label!r} has no mask")
    return problems


def _duplicates(found: Sequence[_Inspected]) -> list[Problem]:
    """Records with the images, the prompt and the answer, or with the id, of an earlier one."""
    first: dict[str, str] = {}
    problems = []
    for one in found:
        if one.key and first.setdefault(one.key, one.where) != one.where:
            text = f"the same as {first[one.key]}"
            problems.append(Problem(ProblemKind.DUPLICATE, one.where, text))
    ids = collections.Counter(one.where for one in found if one.key)
    return problems + [
        Problem(ProblemKind.DUPLICATE, where, f"the id of {count} records")
        for where, count in ids.items()
        if count > 1
    ]


def _shared(
    name: str, found: Sequence[_Inspected], first_use: dict[str, tuple[str, str]]
) -> list[Problem]:
    """Images that an earlier split has; adds those of this one to `first_use`."""
    problems = []
    for one in found:
        for image in one.images:
            split, where = first_use.setdefault(image, (name, one.where))
            if split != name:
                text = f"its image is that of {where}"
                problems.append(Problem(ProblemKind.SHARED, one.where, text))
    return problems


def _split_lines(split: SplitReport) -> Iterator[str]:
    yield f"{split.name + ': ' if split.name else ''}{split.source}"
    yield f"  {split.records:,} records, {split.images:,} different images opened"
    if split.labels:
        labels = [f"{label or '(no label)'} {count:,}" for label, count in split.labels.items()]
        others = len(labels) - _SHOWN_LABELS
        more = f", and {others} other labels" if others > 0 else ""
        text = f"objects: {', '.join(labels[:_SHOWN_LABELS])}{more}"
        yield from textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="    ")
    if split.tokens.size:
        yield from _token_lines(split.tokens, split.length)
    for kind in ProblemKind:
        found = [problem for problem in split.problems if problem.kind is kind]
        if found:
            yield f"  {'*' if kind.stops_training else '-'} {len(found):,} {kind.value}"
        for problem in found[:_SHOWN_PROBLEMS]:
            # An error names its place already.
            where = "" if problem.text.startswith(problem.where) else f"{problem.where}: "
            text = " ".join(problem.text.split())
            yield f"      {where}{text if len(text) <= 300 else text[:297] + '...'}"
        if len(found) > _SHOWN_PROBLEMS:
            yield f"      and {len(found) - _SHOWN_PROBLEMS:,} more"
    yield ""


def _token_lines(tokens: np.ndarray, length: int | None) -> Iterator[str]:
    longest = int(tokens.max())
    yield (
        f"  tokens of prompt and answer: {tokens.min()} to {longest}, median "
        f"{math.ceil(np.median(tokens))}, 99th percentile {math.ceil(np.percentile(tokens, 99))}"
    )
    too_long = 0 if length is None else int(np.sum(tokens > length + 1))
    if too_long:
        yield (
            f"    {too_long:,} of {tokens.size:,} are longer than length={length}, an error or "
            f"truncated; none is with length={longest - 1}."
        )
    else:
        yield f"    None is longer than length={longest - 1 if length is None else length}."
