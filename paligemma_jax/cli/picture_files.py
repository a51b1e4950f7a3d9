"""Files that commands write: whole or not at all, and never over something by accident."""

import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlparse

from paligemma_jax.errors import PaliGemmaError

if TYPE_CHECKING:
    from PIL import Image

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
