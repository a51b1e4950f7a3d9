"""A check of data before training: everything that is wrong with it, at once.

One pass over a source: every record read, its pictures opened, its answer parsed.

What a check of data has found, for people to read.

Many samples on one picture: what the model will be shown, and what it is to answer.
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

import numpy as np
from PIL import Image, ImageDraw

from paligemma_jax.data.batches import Mixture
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
from paligemma_jax.data.transforms import ASK
from paligemma_jax.drawing import draw, drawable, load_font
from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.processing.detections import Detections, Segmentations
from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.location_tokens import parse_answer
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.prompts import split_labels

_THREADS = 4
_BAD_MARK = re.compile(r"<(loc|seg)[^>]*>")

Progress = Callable[[int, int], None]  # records done, records in all


@dataclasses.dataclass(frozen=True)
class Inspected:
    """What one record is like: `place` names it, `pictures` are digests of pixels.

    `tokens` counts bos, newline and eos too; None where it cannot be told.
    """

    number: int
    place: str
    problems: tuple[Problem, ...]
    labels: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    key: str = ""  # equal for records that are the same
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class _Opened:
    digest: str
    size: tuple[int, int]
    fault: str = ""


class Inspector:
    """Looks at records; `open_pictures` says of a record's number whether pictures are opened."""

    def __init__(
        self,
        source: RecordSource,
        processor: Processor | None,
        length: int | None,
        transforms: Sequence[Transform],
        seed: int,
        open_pictures: Callable[[int], bool],
    ):
        self._source = source
        self._processor = processor
        self._length = length
        self._transforms = transforms
        self._seed = seed
        self._open_pictures = open_pictures
        self._known: dict[Path, _Opened] = {}

    def all(self, progress: Progress | None = None) -> list[Inspected]:
        """Every record, in order."""
        found = []
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for inspected in pool.map(self.one, range(len(self._source))):
                found.append(inspected)
                if progress is not None:
                    progress(len(found), len(self._source))
        return found

    def one(self, number: int) -> Inspected:
        """One record; never raises for what is wrong with it."""
        try:
            record = self._source[number]
        except PaliGemmaError as e:
            return _unreadable(number, f"record {number}", e)
        problems = _text_problems(record)
        opened = self._pictures(record) if self._open_pictures(number) else []
        for picture in opened:
            if picture.fault:
                problems.append(Problem(ProblemKind.PICTURE, record.id, picture.fault))
            elif record.size is not None and picture.size != record.size:
                text = f"it is {_by(picture.size)}, and the data says {_by(record.size)}"
                problems.append(Problem(ProblemKind.SIZE, record.id, text))
        if any(picture.fault for picture in opened):
            return Inspected(number, record.id, tuple(problems))
        try:
            changed = self.changed(number, record)
            tokens = self._tokens(changed)
        except (PaliGemmaError, OSError) as e:
            return _unreadable(number, record.id, e)
        if tokens is not None and self._length is not None and tokens > self._length + 1:
            text = f"{tokens} tokens; {self._length + 1} fit"
            problems.append(Problem(ProblemKind.LONG, record.id, text))
        names = [picture.digest for picture in opened] or [_name(one) for one in record.images]
        return Inspected(
            number=number,
            place=record.id,
            problems=tuple(problems),
            labels=tuple(thing.label for thing in parse_answer(record.suffix).objects),
            pictures=tuple(picture.digest for picture in opened),
            key=repr((names, record.prefix, record.suffix, record.answers)),
            tokens=tokens,
        )

    def changed(self, number: int, record: Record) -> Record:
        """The record after the transforms."""
        rng = np.random.default_rng([self._seed, number])
        for transform in self._transforms:
            record = transform(record, rng)
        return record

    def _pictures(self, record: Record) -> list[_Opened]:
        found = []
        for image in record.images:
            path = Path(os.fsdecode(image)) if isinstance(image, str | os.PathLike) else None
            opened = self._known.get(path) if path is not None else None
            if opened is None:
                opened = _open(image)
                if path is not None:
                    self._known[path] = opened
            found.append(opened)
        return found

    def _tokens(self, record: Record) -> int | None:
        if self._processor is None:
            return None
        tokenizer, encoding = self._processor.tokenizer, self._processor.encoding
        answers = record.answers or (record.suffix,)
        longest = max(len(tokenizer.encode(answer)) for answer in answers)
        return len(encoding.prompt_ids(tokenizer, record.prefix)) + longest + 1


def repeated(found: Sequence[Inspected]) -> list[Problem]:
    """Records with the pictures, the prompt and the answer of an earlier one."""
    first: dict[str, str] = {}
    problems = []
    for one in found:
        if one.key and first.setdefault(one.key, one.place) != one.place:
            text = f"the same as {first[one.key]}"
            problems.append(Problem(ProblemKind.REPEATED, one.place, text))
    ids = collections.Counter(one.place for one in found if one.key)
    return problems + [
        Problem(ProblemKind.REPEATED, place, f"the id of {count} records")
        for place, count in ids.items()
        if count > 1
    ]


def _text_problems(record: Record) -> list[Problem]:
    problems = []

    def tell(kind: ProblemKind, text: str) -> None:
        problems.append(Problem(kind, record.id, text))

    if record.prefix != record.prefix.strip():
        tell(
            ProblemKind.TEXT,
            f"the prompt {record.prefix[-40:]!r}; the line break after it comes alone",
        )
    for answer in record.answers or (record.suffix,):
        if not answer.strip():
            tell(ProblemKind.EMPTY, f"{record.prefix[:60]!r} has no answer")
        elif answer != answer.strip():
            tell(ProblemKind.TEXT, f"the answer {answer[-40:]!r}")
        asked = ASK.fullmatch(record.prefix)
        if "<loc" not in answer and "<seg" not in answer:
            if asked and answer.strip():
                tell(ProblemKind.BOX, f"{answer[:60]!r} answers {asked[1]} without a box")
            continue
        parsed = parse_answer(answer)
        for piece in parsed.unused:
            tell(ProblemKind.BOX, f"{piece.text[:60]!r}: {piece.reason}")
        try:
            wanted = split_labels(asked[2]) if asked else ()
        except PaliGemmaError as e:
            tell(ProblemKind.LABEL, f"the prompt {record.prefix[:60]!r}: {e}")
            wanted = ()
        for thing in parsed.objects:
            if mark := _BAD_MARK.search(thing.label):
                tell(ProblemKind.BOX, f"{mark[0]!r} is out of range or out of place")
            elif wanted and thing.label not in wanted:
                tell(ProblemKind.LABEL, f"{thing.label!r} is not among {', '.join(wanted)[:60]}")
            if thing.y1 == thing.y2 or thing.x1 == thing.x2:
                tell(ProblemKind.BOX, f"the box of {thing.label!r} has no area")
            if asked and asked[1] == "segment" and thing.codes is None:
                tell(ProblemKind.BOX, f"{thing.label!r} has no mask")
    return problems


def _open(image: ImageSource) -> _Opened:
    try:
        picture = load_image(image)
    except PaliGemmaError as e:
        return _Opened("", (0, 0), str(e))
    except OSError as e:
        return _Opened("", (0, 0), f"{e.strerror or e}")
    digest = hashlib.blake2b(repr(picture.size).encode(), digest_size=16)
    digest.update(picture.tobytes())
    return _Opened(digest.hexdigest(), picture.size)


def _unreadable(number: int, place: str, error: Exception) -> Inspected:
    return Inspected(number, place, (Problem(ProblemKind.UNREADABLE, place, str(error)),))


def _name(image: ImageSource) -> str:
    return os.fsdecode(image) if isinstance(image, str | os.PathLike) else repr(image)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


_SHOWN = 10  # problems of one kind
_BINS, _BAR = 8, 30


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """One split, or one part of a mixture.

    Attributes:
      name: of the split, or what part it is; "" if there is but one.
      source: what was read.
      records: how many there are.
      opened: different pictures that were opened.
      problems: all that were found.
      labels: objects of each label, the most frequent first.
      tokens: of each readable record, i32[n]; prompt, answer, bos, newline and eos.
      length: T; a record of more than T + 1 tokens does not fit. None if not given.
    """

    name: str
    source: str
    records: int
    opened: int
    problems: tuple[Problem, ...]
    labels: Mapping[str, int]
    tokens: np.ndarray
    length: int | None

    @property
    def too_long(self) -> int:
        """Records that do not fit."""
        return 0 if self.length is None else int(np.sum(self.tokens > self.length + 1))


@dataclasses.dataclass(frozen=True)
class DatasetReport:
    """The splits, and a picture of samples with their targets drawn; `str()` is for people."""

    splits: tuple[SplitReport, ...]
    sheet: Image.Image | None = None
    sheet_path: Path | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Those of all splits."""
        return tuple(problem for split in self.splits for problem in split.problems)

    @property
    def fits(self) -> bool:
        """Whether training would go through all records without stopping or skipping."""
        return not any(problem.kind.stops_training for problem in self.problems)

    def count(self, kind: ProblemKind) -> int:
        """Problems of one kind."""
        return sum(problem.kind is kind for problem in self.problems)

    def save_sheet(self, path: str | os.PathLike[str]) -> None:
        """Writes the contact sheet as a PNG; nothing if there are no samples."""
        if self.sheet is None:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        self.sheet.save(part, "PNG")
        os.replace(part, path)

    def __str__(self) -> str:
        lines = [line for split in self.splits for line in _split_lines(split)]
        if self.sheet_path is not None and self.sheet is not None:
            lines.append(f"Samples with their targets: {self.sheet_path}")
        stopping = sum(problem.kind.stops_training for problem in self.problems)
        if stopping:
            lines.append(f"Training would stop: {stopping:,} problems of the kinds marked with *.")
        elif self.problems:
            lines.append(f"Training would run; {len(self.problems):,} things to look at.")
        else:
            lines.append("Nothing was found wrong.")
        return "\n".join(lines)


def _split_lines(split: SplitReport) -> Iterator[str]:
    yield f"{split.name + ': ' if split.name else ''}{split.source}"
    yield f"  {split.records:,} records, {split.opened:,} different pictures opened"
    if split.labels:
        shown = [f"{label or '(no label)'} {count:,}" for label, count in split.labels.items()]
        more = f", and {len(shown) - 20} other labels" if len(shown) > 20 else ""
        text = f"objects: {', '.join(shown[:20])}{more}"
        yield from textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="    ")
    if split.tokens.size:
        yield from _token_lines(split)
    kinds = collections.Counter(problem.kind for problem in split.problems)
    for kind in ProblemKind:
        if kinds[kind]:
            yield f"  {'*' if kind.stops_training else '-'} {kinds[kind]:,} {kind.value}"
            found = [problem for problem in split.problems if problem.kind is kind]
            for problem in found[:_SHOWN]:
                # An error names its place already.
                place = "" if problem.text.startswith(problem.place) else f"{problem.place}: "
                yield f"      {place}{_one_line(problem.text)}"
            if len(found) > _SHOWN:
                yield f"      and {len(found) - _SHOWN:,} more"
    yield ""


def _token_lines(split: SplitReport) -> Iterator[str]:
    tokens = split.tokens
    yield (
        f"  tokens of prompt and answer: {tokens.min()} to {tokens.max()}, "
        f"median {math.ceil(np.median(tokens))}, 99 of 100 have at most "
        f"{math.ceil(np.percentile(tokens, 99))}"
    )
    step = max(1, math.ceil(int(tokens.max()) / _BINS))
    counts = np.bincount((tokens - 1) // step)
    for place, count in enumerate(counts):
        bar = "#" * math.ceil(_BAR * count / counts.max())
        yield f"    {place * step + 1:5} - {(place + 1) * step:5} {bar:{_BAR}} {count:,}"
    if split.length is None:
        yield f"    All fit with length={int(tokens.max()) - 1}."
    elif split.too_long:
        longest = int(tokens.max()) - 1
        yield (
            f"    {split.too_long:,} of {tokens.size:,} do not fit length={split.length}, "
            f"and would be refused or cut; all fit with length={longest}."
        )
    else:
        yield f"    All fit length={split.length}."


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 300 else flat[:297] + "..."


_SIDE, _GAP, _FONT, _LINE, _LINES = 320, 8, 13, 16, 6  # pixels, and lines of text
_COLUMNS = 4
_BOX = re.compile(r"(<loc\d{4}>){4}")
_MASK = re.compile(r"(<seg\d{3}>){16}")


def contact_sheet(records: Sequence[Record], codec: MaskCodec | None = None) -> Image.Image:
    """Pictures with boxes, and with masks if there is a codec, over prompt, answer and name."""
    cells = [_cell(record, codec) for record in records]
    columns = max(1, min(_COLUMNS, len(cells)))
    width, height = _SIDE + _GAP, _SIDE + _LINES * _LINE + 2 * _GAP
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        sheet.paste(cell, (_GAP + column * width, _GAP + row * height))
    return sheet


def target_text(suffix: str) -> str:
    """An answer with [box] and [mask] for its tokens."""
    return _MASK.sub("[mask] ", _BOX.sub("[box] ", suffix)).replace("  ", " ").strip()


def _cell(record: Record, codec: MaskCodec | None) -> Image.Image:
    cell = Image.new("RGB", (_SIDE, _SIDE + _LINES * _LINE + _GAP), "white")
    pictures = [load_image(image) for image in record.images]
    # Several pictures of one prompt share the room.
    for place, picture in enumerate(pictures):
        room = _SIDE // len(pictures)
        scale = min(room / picture.width, _SIDE / picture.height)
        size = max(1, round(scale * picture.width)), max(1, round(scale * picture.height))
        small = picture.resize(size)
        cell.paste(_drawn(small, record.suffix, codec) if not place else small, (place * room, 0))
    pen, font = ImageDraw.Draw(cell), load_font(_FONT)
    lines = [
        *textwrap.wrap(record.prefix, 46)[:2],
        *textwrap.wrap(f"-> {target_text(record.suffix) or '(nothing)'}", 46)[: _LINES - 3],
    ]
    for place, line in enumerate(lines):
        pen.text((0, _SIDE + 4 + place * _LINE), drawable(font, line), fill="black", font=font)
    below = (0, _SIDE + 4 + len(lines) * _LINE)
    pen.text(below, drawable(font, record.id[-46:]), fill="gray", font=font)
    return cell


def _drawn(picture: Image.Image, suffix: str, codec: MaskCodec | None) -> Image.Image:
    answer = parse_answer(suffix)
    if not answer.objects:
        return picture
    try:
        if codec is not None and any(thing.codes for thing in answer.objects):
            found = Segmentations.decoded(answer, *picture.size, codec.decode)
        else:
            found = Detections.from_answer(answer, *picture.size)
        return draw(picture, found)
    except PaliGemmaError:  # an answer that is wrong is in the report; the picture shows the rest
        return picture


_SAMPLES = 12


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
                problems.append(
                    Problem(ProblemKind.SHARED, one.place, f"its picture is that of {place}")
                )
    return problems


def _samples(
    source: RecordSource, inspector: Inspector, found: Sequence[Inspected], count: int, seed: int
) -> list[Record]:
    """Records that can be read, drawn at random, in order."""
    stopping = {
        one.number for one in found for problem in one.problems if problem.kind.stops_training
        and problem.kind is not ProblemKind.LONG
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
