"""Pictures that commands write: whole or not at all, and never over something by accident."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from paligemma_jax.errors import PaliGemmaError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def plan_targets(out: str, pictures: Sequence[str], *, force: bool) -> dict[str, Path]:
    """The file to write for each picture: `out` itself, or one in the directory `out`.

    Raises PaliGemmaError before any work is done if one could not be written, or exists already
    and `force` is not set.
    """
    path = Path(out).expanduser()
    if len(pictures) == 1 and not path.is_dir() and not out.endswith(("/", os.sep)):
        targets = {pictures[0]: path}
    else:
        targets = {name: path / f"{_stem(name)}.png" for name in dict.fromkeys(pictures)}
        if len(set(targets.values())) < len(targets):
            raise PaliGemmaError(
                f"Several of the pictures are called the same, and {path} can hold each name once. "
                "Different file names fit. Run the command once for each directory of pictures."
            )
        if path.suffix.lower() in FORMATS and not path.is_dir():
            raise PaliGemmaError(
                f"{out} is one file, but there are {len(pictures)} pictures. A directory fits. "
                "Choose for example: --out boxes/"
            )
    for target in targets.values():
        check_target(target, force=force)
    return targets


def check_target(path: Path, *, force: bool = False) -> None:
    """Raises PaliGemmaError if a picture cannot be written to `path`."""
    if path.suffix.lower() not in FORMATS:
        raise PaliGemmaError(
            f"{path} does not say which kind of picture to write. A name that ends in "
            f"{', '.join(FORMATS)} fits. Choose for example: --out {path.stem or 'boxes'}.png"
        )
    if path.is_dir() or (os.path.lexists(path) and not force):
        raise PaliGemmaError(
            f"{path} exists already, and nothing is overwritten unasked. A new name fits. "
            "Choose another --out, or add --force."
        )
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise _unwritable(path, f"nothing can be written into {parent}")


def save_picture(image: "Image.Image", path: Path, *, force: bool = False) -> None:
    """Writes beside, then renames, making directories; raises PaliGemmaError, leaving no file."""
    check_target(path, force=force)
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            image.save(file, format=FORMATS[path.suffix.lower()])
        os.chmod(beside, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(beside, path)
    except BaseException as e:
        if beside is not None and os.path.exists(beside):
            os.unlink(beside)
        if isinstance(e, OSError):
            raise _unwritable(path, e.strerror or str(e)) from e
        raise


def free_name(path: Path) -> Path:
    """`path`, or the first of "name-2.png", "name-3.png" ... that is not there yet."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _stem(name: str) -> str:
    if name == "-":
        return "stdin"
    if name.lower().startswith(("http://", "https://")):
        name = urlparse(name).path
    return Path(name).stem or "picture"


def _unwritable(path: Path, reason: str) -> PaliGemmaError:
    return PaliGemmaError(
        f"{path} cannot be written: {reason}. A place you may write to fits. Choose another --out."
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
