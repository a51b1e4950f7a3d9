"""One pass over a source: every record read, its pictures opened, its answer parsed."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from paligemma_jax.data.problem import Kind, Problem
from paligemma_jax.data.record import Record, RecordSource, Transform
from paligemma_jax.data.text_changes import ASK
from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.processing.image_source import ImageSource, load_image
from paligemma_jax.processing.parsing import parse_answer
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
                problems.append(Problem(Kind.PICTURE, record.id, picture.fault))
            elif record.size is not None and picture.size != record.size:
                text = f"it is {_by(picture.size)}, and the data says {_by(record.size)}"
                problems.append(Problem(Kind.SIZE, record.id, text))
        if any(picture.fault for picture in opened):
            return Inspected(number, record.id, tuple(problems))
        try:
            changed = self.changed(number, record)
            tokens = self._tokens(changed)
        except (PaliGemmaError, OSError) as e:
            return _unreadable(number, record.id, e)
        if tokens is not None and self._length is not None and tokens > self._length + 1:
            text = f"{tokens} tokens; {self._length + 1} fit"
            problems.append(Problem(Kind.LONG, record.id, text))
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
            problems.append(Problem(Kind.REPEATED, one.place, text))
    ids = collections.Counter(one.place for one in found if one.key)
    return problems + [
        Problem(Kind.REPEATED, place, f"the id of {count} records")
        for place, count in ids.items()
        if count > 1
    ]


def _text_problems(record: Record) -> list[Problem]:
    problems = []

    def tell(kind: Kind, text: str) -> None:
        problems.append(Problem(kind, record.id, text))

    if record.prefix != record.prefix.strip():
        tell(Kind.TEXT, f"the prompt {record.prefix[-40:]!r}; the line break after it comes alone")
    for answer in record.answers or (record.suffix,):
        if not answer.strip():
            tell(Kind.EMPTY, f"{record.prefix[:60]!r} has no answer")
        elif answer != answer.strip():
            tell(Kind.TEXT, f"the answer {answer[-40:]!r}")
        asked = ASK.fullmatch(record.prefix)
        if "<loc" not in answer and "<seg" not in answer:
            if asked and answer.strip():
                tell(Kind.BOX, f"{answer[:60]!r} answers {asked[1]} without a box")
            continue
        parsed = parse_answer(answer)
        for piece in parsed.unused:
            tell(Kind.BOX, f"{piece.text[:60]!r}: {piece.reason}")
        try:
            wanted = split_labels(asked[2]) if asked else ()
        except PaliGemmaError as e:
            tell(Kind.LABEL, f"the prompt {record.prefix[:60]!r}: {e}")
            wanted = ()
        for thing in parsed.objects:
            if mark := _BAD_MARK.search(thing.label):
                tell(Kind.BOX, f"{mark[0]!r} is out of range or out of place")
            elif wanted and thing.label not in wanted:
                tell(Kind.LABEL, f"{thing.label!r} is not among {', '.join(wanted)[:60]}")
            if thing.y1 == thing.y2 or thing.x1 == thing.x2:
                tell(Kind.BOX, f"the box of {thing.label!r} has no area")
            if asked and asked[1] == "segment" and thing.codes is None:
                tell(Kind.BOX, f"{thing.label!r} has no mask")
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
    return Inspected(number, place, (Problem(Kind.UNREADABLE, place, str(error)),))


def _name(image: ImageSource) -> str:
    return os.fsdecode(image) if isinstance(image, str | os.PathLike) else repr(image)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
