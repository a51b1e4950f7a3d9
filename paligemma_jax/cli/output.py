"""How commands work through many images, print results, and show progress."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from paligemma_jax.cli.files import Input, count_inputs, read_inputs
from paligemma_jax.errors import PaliGemmaError

if TYPE_CHECKING:
    from paligemma_jax.pipeline import Pipeline

DELAY = 0.7  # seconds; no progress is shown for what is done sooner
Result = TypeVar("Result")
Shown = tuple[str, dict[str, Any]]  # lines of text, and fields of the JSON object


def wants_progress(args: argparse.Namespace) -> bool:
    """Whether to show progress: as asked, else where standard error is a terminal."""
    return sys.stderr.isatty() if args.progress is None else args.progress


@contextlib.contextmanager
def progress_bar(
    args: argparse.Namespace, unit: str, title: str | None = None, total: int | None = None
) -> Iterator[Callable[..., None]]:
    """Yields a function to call with how much more is done, or with (done, total), or (what, ...).

    `unit` is "B" for bytes.
    """
    from tqdm import tqdm

    delay = 0 if args.progress else DELAY
    with tqdm(
        desc=title,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        file=sys.stderr,
        delay=delay,
        leave=not delay,
        disable=not wants_progress(args),
    ) as bar:

        def update(*report: Any) -> None:
            if len(report) == 1:
                bar.update(report[0])
                return
            *what, done, bar.total = report
            bar.update(done - bar.n)
            if what:
                bar.set_postfix_str(what[0].rsplit("/", 2)[-1], refresh=False)

        yield update


@contextlib.contextmanager
def status(args: argparse.Namespace, text: str | None) -> Iterator[None]:
    """Says on a terminal what takes long, while it does; nothing if `text` is None."""
    if text is None or not (wants_progress(args) and sys.stderr.isatty()):
        yield
        return
    print(f"{text} ...", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\033[2K", end="\r", file=sys.stderr, flush=True)


def load_pipeline(args: argparse.Namespace) -> "Pipeline":
    """The model that the options ask for."""
    from paligemma_jax.loading import DEMO, from_pretrained
    from paligemma_jax.models.sharding import Axes

    # In float32 the demo model compiles and answers sooner on CPUs.
    dtype = args.dtype or ("float32" if args.model == DEMO else "bfloat16")
    with progress_bar(args, "B", f"loading {args.model}") as progress:
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


def run_on_images(
    args: argparse.Namespace,
    prompt: str,
    ask: "Callable[[Pipeline, list[Input]], Sequence[Result]]",
    show: Callable[[Input, Result], Shown],
) -> int:
    """Runs the model on each image, or with --multi-image on all together, and prints results.

    An image that cannot be read, or a result that cannot be shown, is reported and stops nothing.

    Args:
      prompt: for the JSON object.
      ask: a result for each of some inputs.
      show: what to print of a result.

    Returns:
      The exit code: 1 if anything failed.
    """
    total, failures, pipeline = count_inputs(args), 0, None
    bar = progress_bar(args, "image", total=total) if total > 1 else contextlib.nullcontext()
    with bar as progress:
        for start in range(0, total, args.batch_size):
            inputs = read_inputs(args, start, start + args.batch_size)
            readable = [one for one in inputs if one.error is None]
            results: Iterator[Result] = iter(())
            if readable:
                pipeline = pipeline or load_pipeline(args)
                with status(args, "compiling and generating" if total == 1 else None):
                    results = iter(ask(pipeline, readable))
            for one in inputs:
                text, error = None, one.error
                fields = one.fields | {"prompt": prompt}
                if error is None:
                    result = next(results)
                    try:
                        text, shown = show(one, result)
                        fields |= shown
                    except PaliGemmaError as e:
                        error = e
                        fields["text"] = getattr(result, "text", None)
                failures += error is not None
                print_result(args, one.label, text, fields, error)
                if progress:
                    progress(1)
    return 1 if failures else 0


def print_result(
    args: argparse.Namespace,
    label: str | None,
    text: str | None,
    fields: dict[str, Any],
    error: PaliGemmaError | None = None,
) -> None:
    """Prints a result as lines, or as a JSON object; an error also on standard error."""
    if error is not None:
        sys.stdout.flush()
        print(f"paligemma: error: {error}", file=sys.stderr, flush=True)
        fields = {"text": None, **fields, "error": str(error)}
    if args.json:
        print_json(fields)
    elif text is not None:
        prefix = f"{label}: " if label else ""
        for line in text.splitlines() or [""]:
            print(f"{prefix}{line}", flush=True)


def print_json(document: Any) -> None:
    """One line, in characters that standard output can print."""
    print(json.dumps(document, ensure_ascii=not encodes_unicode()), flush=True)


def encodes_unicode() -> bool:
    """Whether standard output can print any character."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")


def data_size(count: float) -> str:
    """Bytes in decimal units, such as "5.87 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
