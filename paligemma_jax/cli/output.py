"""Answers on standard output, as lines for people or JSON documents for programs.

Progress bars on standard error.

The same question about many pictures: read and answered in batches.

Answers in words: asked for as the options say, and shown.

Answers printed while they are made (--stream).

Questions and answers beside each other, wrapped to the terminal's width.

Amounts of data in words.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from paligemma_jax.cli.files import Picture, read_picture, read_together
from paligemma_jax.cli.options import sampling_settings
from paligemma_jax.errors import InvalidImageError, PaliGemmaError

if TYPE_CHECKING:
    from paligemma_jax.generation.image_embeddings import EncodedImages
    from paligemma_jax.generation.results import Generation
    from paligemma_jax.pipeline import Images, Pipeline
    from paligemma_jax.processing.processor import Entry


DELAY = 0.7  # seconds; nothing is shown for what is done sooner


def wanted(args: argparse.Namespace) -> bool:
    """Whether to show progress: as asked, else where standard error is a terminal."""
    return sys.stderr.isatty() if args.progress is None else args.progress


@contextlib.contextmanager
def byte_bar(args: argparse.Namespace, title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields the function to call with (what is being done, bytes done, bytes in all)."""
    if not wanted(args):
        yield lambda name, done, total: None
        return
    from tqdm import tqdm

    delay = 0 if args.progress else DELAY
    with tqdm(
        desc=title, unit="B", unit_scale=True, file=sys.stderr, delay=delay, leave=not delay
    ) as bar:

        def update(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done < total:
                bar.set_postfix_str(name.rsplit("/", 2)[-1], refresh=False)

        yield update


@contextlib.contextmanager
def picture_bar(args: argparse.Namespace, total: int) -> Iterator[Callable[[int], None]]:
    """Yields the function to call with the number of pictures done since the last call."""
    if total < 2 or not wanted(args):
        yield lambda count: None
        return
    from tqdm import tqdm

    delay = 0 if args.progress else DELAY
    with tqdm(
        total=total, desc="pictures", unit="picture", file=sys.stderr, delay=delay, leave=not delay
    ) as bar:
        yield lambda count: (bar.update(count), None)[1]


@contextlib.contextmanager
def count_bar(args: argparse.Namespace, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields the function to call with how many are done, and how many there are."""
    if not wanted(args):
        yield lambda done, total: None
        return
    from tqdm import tqdm

    delay = 0 if args.progress else DELAY
    with tqdm(unit=unit, file=sys.stderr, delay=delay, leave=not delay) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextlib.contextmanager
def status(args: argparse.Namespace, text: str | None) -> Iterator[None]:
    """Says what takes long while it does, on a terminal; nothing if `text` is None."""
    if text is None or not (wanted(args) and sys.stderr.isatty()):
        yield
        return
    print(f"{text} ...", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\033[2K", end="\r", file=sys.stderr, flush=True)


A = TypeVar("A")
Ask: TypeAlias = Callable[["Pipeline", list[Picture]], list[A]]  # an answer for each picture


@dataclasses.dataclass(frozen=True)
class Answered(Generic[A]):
    """A picture and the answer about it."""

    picture: Picture
    answer: A

    @property
    def name(self) -> str:
        """What the user called the picture."""
        return self.picture.name


@dataclasses.dataclass(frozen=True)
class Unread:
    """A picture that could not be read."""

    name: str
    error: InvalidImageError


def load_pipeline(args: argparse.Namespace) -> "Pipeline":
    """The model that the options ask for, with a progress bar where loading takes long."""
    from paligemma_jax.loading import DEMO, from_pretrained
    from paligemma_jax.models.sharding import Axes

    # In float32 the demo model compiles and answers sooner on CPUs.
    dtype = args.dtype or ("float32" if args.model == DEMO else "bfloat16")
    with byte_bar(args, f"loading {args.model}") as progress:
        return from_pretrained(
            args.model,
            dtype=dtype,
            resolution=args.resolution,
            tokenizer=args.tokenizer,
            mask_codec=getattr(args, "mask_codec", None),
            quantize=args.quantize,
            adapter=args.adapter,
            mesh=Axes(**args.mesh) if args.mesh else None,
            progress=progress,
        )


def ask_each(args: argparse.Namespace, ask: Ask[A]) -> Iterator[Answered[A] | Unread]:
    """Asks about each picture; the model is loaded once there is a picture to ask about.

    Raises CheckpointError and whatever `ask` does; a picture that cannot be read stops nothing.
    """
    pipeline: Pipeline | None = None
    names = list(enumerate(args.pictures))
    with picture_bar(args, len(names)) as progress:
        for start in range(0, len(names), args.batch_size):
            batch = [_read(name, args, i) for i, name in names[start : start + args.batch_size]]
            pictures = [picture for picture in batch if isinstance(picture, Picture)]
            answers: Iterator[A] = iter(())
            if pictures:
                pipeline = pipeline or load_pipeline(args)
                answers = iter(_answer(args, ask, pipeline, pictures))
            for picture in batch:
                progress(1)
                if isinstance(picture, Unread):
                    yield picture
                else:
                    yield Answered(picture, next(answers))


def ask_together(args: argparse.Namespace, ask: Ask[A]) -> Answered[A]:
    """Asks once about all pictures at the same time; raises PaliGemmaError."""
    together = read_together(args)
    return Answered(together, _answer(args, ask, load_pipeline(args), [together])[0])


def pictures_of(pipeline: "Pipeline", picture: Picture) -> "Entry | EncodedImages":
    """What a method of the pipeline takes; many frames are encoded some at a time."""
    if len(picture.images) == 1:
        return picture.image
    return pipeline.encode(picture.images)


def _read(name: str, args: argparse.Namespace, number: int) -> Picture | Unread:
    try:
        return read_picture(name, args, number)
    except InvalidImageError as e:
        return Unread(name, e)


def _answer(
    args: argparse.Namespace, ask: Ask[A], pipeline: "Pipeline", pictures: list[Picture]
) -> list[A]:
    message = "compiling and answering" if len(args.pictures) == 1 else None
    with status(args, message):
        return ask(pipeline, pictures)


Shown = tuple[str, dict[str, Any]]  # lines for people, and the JSON document's fields


@dataclasses.dataclass(frozen=True)
class Subject:
    """What an answer is about: what its lines begin with, and its part of a document."""

    label: str | None  # where it is one of several
    fields: dict[str, Any]


class Report:
    """Prints answers as they come, and remembers whether everything went well."""

    def __init__(self, args: argparse.Namespace):
        self._json: bool = args.json
        self.failures = 0

    def answer(self, subject: Subject, shown: Shown) -> None:
        """Prints what is shown to people, or the document for programs."""
        text, fields = shown
        if self._json:
            print_json(subject.fields | fields)
            return
        prefix = f"{subject.label}: " if subject.label else ""
        for line in text.splitlines() or [""]:
            print(f"{prefix}{line}", flush=True)

    def failure(self, subject: Subject, error: PaliGemmaError, answer: str | None = None) -> None:
        """Says on standard error what is wrong with one picture or its answer."""
        self.failures += 1
        sys.stdout.flush()
        print(f"paligemma: error: {error}", file=sys.stderr, flush=True)
        if self._json:
            print_json(subject.fields | {"answer": answer, "error": str(error)})

    @property
    def exit_code(self) -> int:
        """1 if anything failed."""
        return 1 if self.failures else 0


def picture_subject(args: argparse.Namespace, name: str, prompt: str) -> Subject:
    """A prompt about one of the pictures that a command was given."""
    label = name if len(args.pictures) > 1 else None
    return Subject(label, {"file": name, "prompt": prompt})


def report_each(
    args: argparse.Namespace,
    prompt: str,
    ask: Ask[A],
    present: Callable[[Answered[A]], Shown],
) -> int:
    """Asks about each picture and prints what `present` makes of the answer.

    Errors of single pictures and of `present` are reported; the others go on. Returns the exit
    code.
    """
    report = Report(args)
    for reply in ask_each(args, ask):
        subject = picture_subject(args, reply.name, prompt)
        if isinstance(reply, Unread):
            report.failure(subject, reply.error)
            continue
        try:
            shown = present(reply)
        except PaliGemmaError as e:
            report.failure(subject, e, getattr(reply.answer, "text", None))
        else:
            report.answer(subject, shown)
    return report.exit_code


def report_together(
    args: argparse.Namespace,
    prompt: str,
    ask: Ask[A],
    present: Callable[[Answered[A]], Shown],
) -> int:
    """The same, asking once about all pictures at the same time; raises PaliGemmaError."""
    shown = present(ask_together(args, ask))
    Report(args).answer(Subject(None, {"files": args.pictures, "prompt": prompt}), shown)
    return 0


def print_json(document: dict[str, Any]) -> None:
    """One line, in letters that standard output can print."""
    print(json.dumps(document, ensure_ascii=not encodes_unicode()), flush=True)


def encodes_unicode() -> bool:
    """Whether standard output can print any letter."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")


@dataclasses.dataclass(frozen=True)
class Answers:
    """To one prompt: one, or as many as were drawn or searched for, best first."""

    ranked: "Sequence[Generation]"
    pieces: Sequence[str] = ()  # of the best one's tokens, to be shown with their logprobs


def ask_in_words(
    args: argparse.Namespace,
    pipeline: "Pipeline",
    images: "Sequence[Images] | None",
    prompts: Sequence[str],
    numbers: Sequence[int],
) -> list[Answers]:
    """Answers to each prompt; prompt i draws from the seed of the options + numbers[i]."""
    shared: dict[str, Any] = dict(
        max_new_tokens=args.max_new_tokens,
        answer_prefixes=[args.begin] * len(prompts) if args.begin else None,
        batch_size=args.batch_size,
    )
    ranked: Sequence[Sequence[Generation]]
    if args.beams:
        ranked = pipeline.beam_search(
            images,
            prompts,
            num_beams=args.beams,
            length_penalty=args.alpha or 0.0,
            num_return_sequences=args.beams if args.json else 1,  # one is found sooner
            **shared,
        )
        return list(map(Answers, ranked))
    shared |= dict(
        min_new_tokens=args.min_new_tokens,
        **sampling_settings(args),
        seed=[args.seed + number for number in numbers],
        stop=args.stop,
    )
    if args.best_of:
        penalty = args.alpha or 0.0
        ranked = pipeline.best_of(images, prompts, n=args.best_of, length_penalty=penalty, **shared)
    else:
        ranked = [[answer] for answer in pipeline.generate(images, prompts, **shared)]
    if not args.logprobs:
        return list(map(Answers, ranked))
    piece = pipeline.processor.tokenizer.piece
    return [Answers(row, [piece(token) for token in row[0].tokens]) for row in ranked]


def show_in_words(args: argparse.Namespace, answers: Answers) -> Shown:
    """The best answer, and for programs all."""
    best = answers.ranked[0]
    lines = [best.text]
    if answers.pieces:
        logprobs = getattr(best, "logprobs", ())
        lines += [f"{p:.4f} {piece}" for p, piece in zip(logprobs, answers.pieces, strict=True)]
    fields = _fields(args, best)
    if args.begin:
        fields |= {"begin": args.begin}
    if args.best_of or args.beams:
        fields |= {"answers": [_fields(args, answer) for answer in answers.ranked]}
    return "\n".join(lines), fields


def plain_fields(answer: "Generation") -> dict[str, Any]:
    """What is said of every answer."""
    return {"answer": answer.text, "tokens": list(answer.tokens), "logprob": answer.logprob}


def _fields(args: argparse.Namespace, answer: "Generation") -> dict[str, Any]:
    fields = plain_fields(answer)
    if args.best_of or args.beams:
        fields["score"] = answer.score
    if args.logprobs:
        fields["logprobs"] = list(getattr(answer, "logprobs", ()))
    if args.stop:
        fields["stop"] = getattr(answer, "stop", None)
    return fields


def stream_each(args: argparse.Namespace, prompt: str) -> int:
    """Streams the answer about each picture, one after the other; returns the exit code.

    A picture that cannot be read stops nothing.
    """
    report = Report(args)
    pipeline: Pipeline | None = None
    for number, name in enumerate(args.pictures):
        subject = picture_subject(args, name, prompt)
        try:
            picture = read_picture(name, args, number)
        except InvalidImageError as e:
            report.failure(subject, e)
            continue
        pipeline = pipeline or load_pipeline(args)
        images = pictures_of(pipeline, picture)
        print_stream(args, pipeline, images, prompt, number, subject.label)
    return report.exit_code


def stream_together(args: argparse.Namespace, prompt: str) -> int:
    """Streams the answer about all pictures at the same time; raises PaliGemmaError."""
    picture = read_together(args)
    pipeline = load_pipeline(args)
    print_stream(args, pipeline, pictures_of(pipeline, picture), prompt, 0, None)
    return 0


def print_stream(
    args: argparse.Namespace,
    pipeline: "Pipeline",
    images: "Images",
    prompt: str,
    number: int,
    label: str | None,
) -> None:
    """Prints one answer as it comes; `label` begins its lines, where it is one of several."""
    prefix = f"{label}: " if label else ""
    pieces = pipeline.stream(
        images,
        prompt,
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        **sampling_settings(args),
        seed=args.seed + number,
        stop=args.stop,
        answer_prefix=args.begin,
    )
    with contextlib.closing(pieces):
        with status(args, "compiling and answering" if number == 0 else None):
            first = str(next(pieces, ""))
        print(prefix, end="")
        try:
            _print(first, prefix)
            for piece in pieces:
                _print(str(piece), prefix)
        finally:
            print(flush=True)  # also where it is interrupted


def _print(piece: str, prefix: str) -> None:
    print(piece.replace("\n", f"\n{prefix}"), end="", flush=True)


NARROWEST, WIDEST = 72, 128


@dataclasses.dataclass(frozen=True)
class Row:
    """A question and its answer; the truth and whether the answer is right where that is known."""

    question: str
    answer: str
    truth: str | None = None
    right: bool | None = None


def render_table(rows: Sequence[Row], marks: str) -> Iterator[str]:
    """Lines of a table; `marks` are the letters for right and wrong."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, NARROWEST), WIDEST)
    known = any(row.truth is not None for row in rows)
    headings = ["question", "the model's answer", *(["the truth"] if known else [])]
    columns = [1, *[(width - 1) // len(headings) - 2] * len(headings)]
    yield _line(columns, ["", *headings])
    yield "-" * (sum(columns) + 2 * len(headings))
    for row in rows:
        mark = "" if row.right is None else marks[0] if row.right else marks[1]
        cells = [mark, row.question, row.answer or "(empty)"]
        if known:
            cells.append(row.truth or "(empty)")
        wrapped = [_wrap(cell, size) for cell, size in zip(cells, columns, strict=True)]
        for parts in itertools.zip_longest(*wrapped, fillvalue=""):
            yield _line(columns, parts)


def _wrap(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width)]


def _line(columns: Sequence[int], cells: Sequence[str]) -> str:
    padded = (f"{cell:{width}}" for cell, width in zip(cells, columns, strict=True))
    return "  ".join(padded).rstrip()


def data_size(count: float) -> str:
    """Bytes in decimal units, such as "5.87 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
