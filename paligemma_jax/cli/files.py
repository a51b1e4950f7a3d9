"""Files of the commands: images and videos in; drawings and masks out, whole or not at all.

No command replaces a file without --force, and targets are checked before any work is done.
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
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlparse

from paligemma_jax.errors import InvalidImageError, PaliGemmaError

if TYPE_CHECKING:
    from PIL import Image

    from paligemma_jax.processing.detections import Segmentations

STDIN = "-"
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi")
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SVG = ".svg"
_MAX_LABEL = 60  # characters of a label in a file name


@dataclasses.dataclass(frozen=True)
class Input:
    """The images of one prompt.

    Attributes:
      fields: what the user called them, for JSON: {"file": name} or {"files": names}.
      label: what lines of the output begin with; None for the only one.
      index: its place among all inputs of the command.
      images: one, several, or the frames of a video; none where they cannot be read.
      error: why they cannot be read.
    """

    fields: dict[str, Any]
    label: str | None
    index: int
    images: "tuple[Image.Image, ...]" = ()
    error: InvalidImageError | None = None

    @property
    def name(self) -> str:
        """The name of a single file."""
        return self.fields["file"]


def check_arguments(args: argparse.Namespace, words: str | None = None) -> None:
    """Ends the command with a usage error if arguments were plainly mixed up.

    `words` names the last argument, which is not an image, such as "question".
    """
    if args.images.count(STDIN) > 1:
        args.usage_error("- is standard input, which holds one image only")
    last = None if words is None else getattr(args, words)
    if last is not None and (last == STDIN or os.path.isfile(last)):
        args.usage_error(
            f"the last argument must be the {str(words).upper()}, but {last} is a file; images "
            f"come first: paligemma {args.command} image.jpg {str(words).upper()}"
        )


def read_inputs(args: argparse.Namespace, start: int, stop: int) -> list[Input]:
    """Reads inputs start .. stop - 1 of the command; what cannot be read keeps its error."""
    together = getattr(args, "multi_image", False)
    groups = [tuple(args.images)] if together else [(name,) for name in args.images]
    inputs = []
    for index, names in enumerate(groups[start:stop], start):
        fields = {"files": list(names)} if together else {"file": names[0]}
        label = names[0] if len(groups) > 1 else None
        try:
            images = tuple(image for name in names for image in _read(name, args))
            inputs.append(Input(fields, label, index, images))
        except InvalidImageError as e:
            inputs.append(Input(fields, label, index, error=e))
    return inputs


def count_inputs(args: argparse.Namespace) -> int:
    """Number of inputs of the command."""
    return 1 if getattr(args, "multi_image", False) else len(args.images)


def _read(source: str, args: argparse.Namespace) -> "Sequence[Image.Image]":
    from paligemma_jax.processing.image import load_image

    if source == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise InvalidImageError(
                "expected the bytes of an image file on standard input, got nothing. Run: "
                f"paligemma {args.command} - < image.jpg"
            )
        return [load_image(sys.stdin.buffer)]
    if source.lower().startswith(("http://", "https://")):
        if not args.allow_urls:
            raise InvalidImageError(
                f"expected an image file, got the URL {source}. To download it, pass --allow-urls"
            )
        return [load_image(source, allow_urls=True)]
    if not Path(source).suffix and os.sep not in source and not os.path.lexists(source):
        raise InvalidImageError(
            f"expected the path of an image file, got {source!r}, which does not exist. Words go "
            f"into one last argument, in quotes. See: paligemma {args.command} --help"
        )
    if source.lower().endswith(VIDEO_SUFFIXES):
        if "frames" not in args:
            raise InvalidImageError(
                f"{args.command} expects images, got the video {source}. Ask about videos with, "
                f'for example: paligemma answer "{source}" "what happens?"'
            )
        from paligemma_jax.processing.video import read_frames

        return read_frames(source, args.frames)
    return [load_image(source)]


def user_path(text: str) -> Path:
    """A path as the user wrote it; "~" is the home directory."""
    return Path(os.path.expanduser(text))


def check_target(
    path: Path, *, option: str, force: bool, suffixes: Collection[str] = IMAGE_FORMATS
) -> None:
    """Raises PaliGemmaError if `path` cannot be written, exists, or has none of `suffixes`."""
    if path.suffix.lower() not in suffixes:
        raise PaliGemmaError(
            f"expected a file name ending in {', '.join(suffixes)}, got {str(path)!r}. For "
            f'example: {option} "{path.stem or "boxes"}.png"'
        )
    try:
        os.lstat(path)
        exists = True
    except (FileNotFoundError, NotADirectoryError):
        exists = False
    except OSError as e:  # a name that is too long, or a directory that may not be entered
        raise _cannot_write(path, e.strerror or str(e), option) from e
    if os.path.isdir(path) or (exists and not force):
        raise _file_exists(path, option)
    _check_parent(path, option)


def write_whole(path: Path, write: Callable[[IO[bytes]], object], option: str) -> None:
    """Writes beside `path`, then renames; makes directories; PaliGemmaError where it cannot."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException as e:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(e, OSError):
            raise _cannot_write(path, e.strerror or str(e), option) from e
        raise


def save_image(image: "Image.Image", path: Path, *, option: str, force: bool) -> None:
    """Writes an image in the format of the name; raises PaliGemmaError, leaving no file."""
    check_target(path, option=option, force=force)
    format = IMAGE_FORMATS[path.suffix.lower()]
    write_whole(path, lambda file: image.save(file, format=format), option)


def free_name(path: Path) -> Path:
    """`path`, or the first of "name-2.png", "name-3.png" ... that does not exist."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


class DrawingFiles:
    """One drawing per image: the file that `option` names, or a file in that directory.

    Raises PaliGemmaError before any work is done if one of them could not be written, or exists
    and `force` is not set. Without the option there are none.
    """

    def __init__(self, out: str | None, names: Sequence[str], *, option: str, force: bool):
        self.option, self._force = option, force
        self.paths: dict[str, Path] = {}
        if out is None:
            return
        path = user_path(out)
        is_directory = out.endswith(("/", os.sep)) or os.path.isdir(path)
        if len(names) == 1 and not is_directory:
            self.paths = {names[0]: path}
        elif path.suffix.lower() in IMAGE_FORMATS and not is_directory:
            raise PaliGemmaError(
                f"expected a directory for {len(names)} images, got {out}. For example: "
                f"{option} boxes/"
            )
        else:
            self.paths = {name: path / f"{stem}.png" for name, stem in _stems(names, path).items()}
        for target in self.paths.values():
            check_target(target, option=option, force=force)

    def save(self, name: str, image: "Image.Image") -> str:
        """Writes the drawing of one image, and returns its path; raises PaliGemmaError."""
        save_image(image, self.paths[name], option=self.option, force=self._force)
        return str(self.paths[name])


class MaskFiles:
    """Masks as directory/image-1-label.png: 8 bits a pixel, 255 in the object, 0 outside.

    Raises PaliGemmaError before any work is done if the directory cannot be written into, or holds
    masks of one of the images already and `force` is not set; `taken` are files that the command
    writes elsewhere.
    """

    option = "--masks"

    def __init__(self, out: str, names: Sequence[str], *, force: bool, taken: Collection[Path]):
        self._directory, self._force, self._taken = user_path(out), force, set(taken)
        if os.path.lexists(self._directory) and not os.path.isdir(self._directory):
            raise PaliGemmaError(
                f"expected a directory, got the file {out}. For example: {self.option} masks/"
            )
        _check_parent(self._directory / "mask.png", self.option)
        self._stems = _stems(names, self._directory)
        search = not force and os.path.isdir(self._directory)
        present = self._directory.iterdir() if search else ()
        for path in sorted(present):
            match = re.fullmatch(r"(.*?)-\d+-[A-Za-z0-9-]+\.png", path.name)
            if match and match[1] in self._stems.values():
                raise _file_exists(path, self.option)

    def save(self, name: str, found: "Segmentations") -> list[str]:
        """Writes the masks of one image, and returns their paths; raises PaliGemmaError."""
        import numpy as np
        from PIL import Image

        paths = []
        for number, one in enumerate(found, 1):
            part = file_name_part(one.label)
            path = self._directory / f"{self._stems[name]}-{number}-{part}.png"
            if path in self._taken:
                raise _file_exists(path, self.option)
            pixels = Image.fromarray(one.mask.astype(np.uint8) * 255)
            save_image(pixels, path, option=self.option, force=self._force)
            self._taken.add(path)
            paths.append(str(path))
        return paths


def file_name_part(label: str) -> str:
    """A label in letters that are safe in a file name anywhere: "Café ?" -> "Cafe"."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain)[:_MAX_LABEL].strip("-") or "object"


def _stems(names: Sequence[str], directory: Path) -> dict[str, str]:
    """Each image's name without suffix; PaliGemmaError if two images have the same."""
    stems = {name: _stem(name) for name in names}
    if len(set(stems.values())) < len(stems):
        raise PaliGemmaError(
            f"expected images with different file names, which {directory} needs. Run the command "
            "once for each directory of images"
        )
    return stems


def _stem(name: str) -> str:
    if name == STDIN:
        return "stdin"
    path = urlparse(name).path if name.lower().startswith(("http://", "https://")) else name
    return Path(path).stem or "image"


def _check_parent(path: Path, option: str) -> None:
    """Raises PaliGemmaError if no file can be made in the directory of `path`."""
    parent = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise _cannot_write(path, f"{parent} is not a writable directory", option)


def _cannot_write(path: Path, reason: str, option: str) -> PaliGemmaError:
    return PaliGemmaError(f"cannot write {path}: {reason}. Choose another {option}")


def _file_exists(path: Path, option: str) -> PaliGemmaError:
    return PaliGemmaError(f"{path} exists. Choose another {option}, or pass --force to replace it")
