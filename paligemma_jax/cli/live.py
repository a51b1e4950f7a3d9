"""Answers printed while they are made (--stream)."""

import argparse
import contextlib
from typing import TYPE_CHECKING

from paligemma_jax.cli.asking import load_pipeline, pictures_of
from paligemma_jax.cli.choosing import sampler_of
from paligemma_jax.cli.pictures import read_picture, read_together
from paligemma_jax.cli.progress import status
from paligemma_jax.cli.report import Report, picture_subject
from paligemma_jax.errors import InvalidImageError

if TYPE_CHECKING:
    from paligemma_jax.answering.questions import Pictures
    from paligemma_jax.pipeline import Pipeline


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
    images: "Pictures",
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
        sampler=sampler_of(args),
        seed=args.seed + number,
        stop=args.stop,
        beginning=args.begin,
    )
    with contextlib.closing(pieces):
        with status(args, "compiling and answering" if number == 0 else None):
            first = next(pieces, "")
        print(prefix, end="")
        try:
            _print(first, prefix)
            for piece in pieces:
                _print(piece, prefix)
        finally:
            print(flush=True)  # also where it is interrupted


def _print(piece: str, prefix: str) -> None:
    print(piece.replace("\n", f"\n{prefix}"), end="", flush=True)
