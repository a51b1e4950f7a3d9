"""Files that commands write: whole or not at all, and never over something by accident.

Pictures from what a user names on the command line.

The masks of `paligemma segment` as files, one an object.
"""

import argparse
import dataclasses
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlparse

from paligemma_jax.errors import InvalidImageError, PaliGemmaError

if TYPE_CHECKING:
    from PIL import Image

    from paligemma_jax.processing.detections import Segmentations


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SVG = ".svg"
OUT = "--out"


def plan_targets(
    out: str | None, pictures: Sequence[str], *, force: bool, option: str = OUT
) -> dict[str, Path]:
    """The file to write for each picture: `out` itself, or one in the directory `out`.

    None for none is an empty plan. Raises PaliGemmaError before any work is done if one could not
    be written, or exists already and `force` is not set; `option` is what `out` was given as.
    """
    if out is None:
        return {}
    path = user_path(out)
    if len(pictures) == 1 and not is_directory(out):
        targets = {pictures[0]: path}
    else:
        targets = {name: path / f"{stem}.png" for name, stem in stems(pictures, path).items()}
        if path.suffix.lower() in FORMATS and not os.path.isdir(path):
            raise PaliGemmaError(
                f"{out} is one file, but there are {len(pictures)} pictures. A directory fits. "
                f"Choose for example: {option} boxes/"
            )
    for target in targets.values():
        check_target(target, force=force, option=option)
    return targets


def user_path(text: str) -> Path:
    """A path as the user wrote it, "~" too."""
    return Path(os.path.expanduser(text))


def is_directory(text: str) -> bool:
    """Whether the user means a directory, which need not exist."""
    return text.endswith(("/", os.sep)) or os.path.isdir(os.path.expanduser(text))


def stems(pictures: Sequence[str], directory: Path) -> dict[str, str]:
    """Each picture's name without ending; PaliGemmaError if `directory` needs one of them twice."""
    names = {name: _stem(name) for name in pictures}
    if len(set(names.values())) < len(names):
        raise PaliGemmaError(
            f"Several of the pictures are called the same, and {directory} can hold each name "
            "once. Different file names fit. Run the command once for each directory of pictures."
        )
    return names


def check_target(
    path: Path, *, force: bool = False, option: str = OUT, endings: Collection[str] = FORMATS
) -> None:
    """Raises PaliGemmaError if `path` cannot be written, or is no name with one of `endings`."""
    if path.suffix.lower() not in endings:
        raise PaliGemmaError(
            f"{path} does not say which kind of picture to write. A name that ends in "
            f"{', '.join(endings)} fits. Choose for example: {option} {path.stem or 'boxes'}.png"
        )
    try:
        os.lstat(path)
        exists = True
    except (FileNotFoundError, NotADirectoryError):
        exists = False
    except OSError as e:  # a name that is too long, or a directory that may not be entered
        raise _unwritable(path, e.strerror or str(e), option) from e
    if os.path.isdir(path) or (exists and not force):
        raise exists_already(path, option)
    check_parent(path, option)


def check_parent(path: Path, option: str) -> None:
    """Raises PaliGemmaError if no file can be made in the directory of `path`."""
    parent = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise _unwritable(path, f"nothing can be written into {parent}", option)


def exists_already(path: Path, option: str) -> PaliGemmaError:
    """The error for something that would be overwritten."""
    return PaliGemmaError(
        f"{path} exists already, and nothing is overwritten unasked. A new name fits. "
        f"Choose another {option}, or add --force."
    )


def save_picture(
    image: "Image.Image", path: Path, *, force: bool = False, option: str = OUT
) -> None:
    """Writes beside, then renames, making directories; raises PaliGemmaError, leaving no file."""
    check_target(path, force=force, option=option)
    kind = FORMATS[path.suffix.lower()]
    _write_whole(path, lambda file: image.save(file, format=kind), option)


def save_svg(text: str, path: Path, *, force: bool = False, option: str = OUT) -> None:
    """The same for the text of an SVG."""
    check_target(path, force=force, option=option, endings=(SVG,))
    _write_whole(path, lambda file: file.write(text.encode()), option)


def free_name(path: Path) -> Path:
    """`path`, or the first of "name-2.png", "name-3.png" ... that is not there yet."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _write_whole(path: Path, write: Callable[[IO[bytes]], object], option: str) -> None:
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(beside, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(beside, path)
    except BaseException as e:
        if beside is not None and os.path.exists(beside):
            os.unlink(beside)
        if isinstance(e, OSError):
            raise _unwritable(path, e.strerror or str(e), option) from e
        raise


def _stem(name: str) -> str:
    if name == "-":
        return "stdin"
    if name.lower().startswith(("http://", "https://")):
        name = urlparse(name).path
    return Path(name).stem or "picture"


def _unwritable(path: Path, reason: str, option: str) -> PaliGemmaError:
    return PaliGemmaError(
        f"{path} cannot be written: {reason}. A place you may write to fits. Choose another "
        f"{option}."
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
    from paligemma_jax.processing.image import load_image

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


OPTION = "--masks"
_LONGEST = 60  # characters of a label in a file's name


class MaskFiles:
    """Writes masks as directory/picture-1-label.png: 8 bits a pixel, 255 in the object, 0 outside.

    Raises PaliGemmaError before any work is done if the directory cannot be written into, or if it
    holds masks of one of the pictures already and `force` is not set; `taken` are files that the
    command writes elsewhere.
    """

    def __init__(
        self, out: str, pictures: Sequence[str], *, force: bool, taken: Collection[Path] = ()
    ):
        self._directory = user_path(out)
        self._force = force
        self._taken = set(taken)
        if os.path.lexists(self._directory) and not os.path.isdir(self._directory):
            raise PaliGemmaError(
                f"{out} is a file. A directory fits, which need not exist. Choose for example: "
                f"{OPTION} masks/"
            )
        check_parent(self._directory / "mask.png", OPTION)
        self._stems = stems(pictures, self._directory)
        for present in [] if force else _masks_in(self._directory, set(self._stems.values())):
            raise exists_already(present, OPTION)

    def save(self, picture: str, found: "Segmentations") -> list[str]:
        """Writes the masks of one picture, whose paths are returned; raises PaliGemmaError."""
        import numpy as np
        from PIL import Image

        paths = []
        for number, one in enumerate(found, 1):
            name = f"{self._stems[picture]}-{number}-{file_name_part(one.label)}.png"
            path = self._directory / name
            if path in self._taken:
                raise exists_already(path, OPTION)
            pixels = Image.fromarray(one.mask.astype(np.uint8) * 255)
            save_picture(pixels, path, force=self._force, option=OPTION)
            self._taken.add(path)
            paths.append(str(path))
        return paths


def file_name_part(label: str) -> str:
    """A label in letters that are safe in a file's name anywhere: "Café ?" -> "Cafe"."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain)[:_LONGEST].strip("-") or "object"


def _masks_in(directory: Path, names: set[str]) -> list[Path]:
    """Files in a directory that look like masks of pictures of these names."""
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    matches = ((file, re.fullmatch(r"(.*?)-\d+-[A-Za-z0-9-]+\.png", file.name)) for file in files)
    return [file for file, match in matches if match and match[1] in names]
