"""Pictures from what a user names on the command line."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma_jax.errors import InvalidImageError

if TYPE_CHECKING:
    from PIL import Image

STDIN = "-"
VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi")


@dataclasses.dataclass(frozen=True)
class Picture:
    """What one prompt is about, and what the user called it: a picture, or frames of a video.

    `number` is its place among all that the command is asked about.
    """

    name: str
    images: "tuple[Image.Image, ...]"
    number: int = 0

    @property
    def image(self) -> "Image.Image":
        """The picture, or the first of several."""
        return self.images[0]


def check_arguments(args: argparse.Namespace, words: str | None = None) -> None:
    """Ends the command with a usage error if arguments were plainly mixed up.

    `words` names the last argument, which is no picture, such as "question".
    """
    if args.pictures.count(STDIN) > 1:
        args.usage_error("- stands for standard input, which holds one picture only")
    if words is None:
        return
    last = getattr(args, words)
    if last == STDIN or os.path.isfile(last):
        args.usage_error(
            f"the last argument is the {words.upper()}, but {last} is a picture; pictures come "
            f"first: paligemma {args.command} picture.jpg {words.upper()}"
        )


def read_picture(source: str, args: argparse.Namespace, number: int = 0) -> Picture:
    """Reads a file, standard input ("-"), or an address if allowed.

    Raises InvalidImageError, and MissingExtraError for a video without what reads it.
    """
    from paligemma_jax.processing.image_source import load_image

    if source == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise InvalidImageError(
                "Nothing is piped into standard input. The bytes of a picture file fit. Run: "
                f"paligemma {args.command} - < picture.jpg"
            )
        return Picture(source, (load_image(sys.stdin.buffer),), number)
    if _is_url(source):
        if not args.allow_urls:
            raise InvalidImageError(
                f"{source} is an address, and reading from the network is off. A file fits. "
                "Add --allow-urls to download it."
            )
        return Picture(source, (load_image(source, allow_urls=True),), number)
    if not Path(source).suffix and os.sep not in source and not os.path.lexists(source):
        raise InvalidImageError(
            f"There is no picture {source}. The path of a picture file fits. If it was meant as "
            f"words: they go into one last argument, in quotes. See: paligemma {args.command} "
            "--help"
        )
    if source.lower().endswith(VIDEOS):
        return Picture(source, _frames(source, args), number)
    return Picture(source, (load_image(source),), number)


def read_together(args: argparse.Namespace) -> Picture:
    """All pictures that the command was given, as those of one prompt; raises as `read_picture`."""
    pictures = [read_picture(name, args) for name in args.pictures]
    images = tuple(image for picture in pictures for image in picture.images)
    return Picture(", ".join(args.pictures), images)


def _frames(source: str, args: argparse.Namespace) -> "tuple[Image.Image, ...]":
    from paligemma_jax.processing.video import read_frames

    if "frames" not in args:
        raise InvalidImageError(
            f"{source} is a video, and {args.command} is about single pictures. A picture file "
            f'fits. Ask about videos with, for example: paligemma answer {source} "what happens?"'
        )
    return tuple(read_frames(source, args.frames))


def _is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))
