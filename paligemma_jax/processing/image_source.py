"""Any picture a user may hold -> an upright 8-bit RGB `PIL.Image`."""

import io
import os
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from paligemma_jax.errors import InvalidImageError
from paligemma_jax.processing.download import download
from paligemma_jax.processing.image_array import image_from_array

Data: TypeAlias = bytes | bytearray | memoryview
ImageSource: TypeAlias = str | os.PathLike[str] | Data | IO[bytes] | Image.Image | np.ndarray

MAX_PIXELS = 89_478_485  # Pillow's own threshold of suspicion: a quarter GiB of 8-bit RGB
MAX_BYTES = 512 * 2**20
# Only widely used decoders are reachable from untrusted bytes; Pillow has many others.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def load_image(
    source: ImageSource, *, allow_urls: bool = False, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The picture as `PIL.Image` in mode RGB; raises InvalidImageError for what is no picture.

    Accepts a path, the bytes of a file, a binary file object, a PIL image, a numpy array (in RGB
    order; see `image_from_array`), or, with `allow_urls`, an http(s) address. EXIF orientation is
    applied, animations give their first frame, 16-bit grey keeps its high byte, transparency is
    dropped (as in big_vision and Hugging Face), embedded colour profiles are ignored. More than
    `max_pixels` are refused before any is decoded; Pillow itself refuses more than twice
    `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the PIL image", max_pixels)
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if isinstance(text, str) and text.lower().startswith(("http://", "https://")):
            return _decode(_from_url(text, allow_urls), text, max_pixels)
        return _decode(_from_path(Path(os.fsdecode(text))), os.fsdecode(text), max_pixels)
    if isinstance(source, Data):
        return _decode(bytes(source), f"the data of {len(source):,} bytes", max_pixels)
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        return _decode(
            _from_file(source), name if isinstance(name, str) else "the file object", max_pixels
        )
    if hasattr(source, "__array__"):
        return image_from_array(np.asarray(source))
    raise InvalidImageError(
        f"{type(source).__name__} is no picture. A path, bytes, a binary file, a PIL image or a "
        "numpy array fits. Pass for example images=['cat.jpg']."
    )


def _from_url(url: str, allow_urls: bool) -> bytes:
    if not allow_urls:
        raise InvalidImageError(
            f"{url} is an address, and reading from the network is off. A path or bytes fit. "
            "Pass allow_urls=True to download it."
        )
    return download(url, max_bytes=MAX_BYTES)


def _from_path(path: Path) -> bytes:
    path = path.expanduser()
    try:
        # A pipe or device could block for ever, so only regular files are opened.
        if not path.is_file():
            kind = (
                "is a directory"
                if path.is_dir()
                else "is no regular file"
                if path.exists()
                else "does not exist"
            )
            raise InvalidImageError(
                f"The picture {path} {kind}. The path of a picture file is needed. "
                f"Look with: ls {path.parent}"
            )
        with path.open("rb") as file:
            return _from_file(file)
    except (OSError, ValueError) as e:  # ValueError: a null byte in the path
        if isinstance(e, InvalidImageError):
            raise
        reason = e.strerror if isinstance(e, OSError) else "not a valid path"
        raise InvalidImageError(
            f"The picture {str(path)!r} cannot be read: {reason}. A readable picture file is "
            f"needed. Look with: ls -l {path.parent}"
        ) from e


def _from_file(file: Any) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if not isinstance(data, bytes):
        raise InvalidImageError(
            "The file object gives text, not bytes. A file opened in binary mode fits. "
            "Open it with: open(path, 'rb')"
        )
    if len(data) > MAX_BYTES:
        raise InvalidImageError(
            f"The picture file is larger than {MAX_BYTES:,} bytes. A smaller file fits. "
            "Save it compressed or at a lower resolution."
        )
    return data


def _decode(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """Decodes the bytes of a file; Pillow's own words stay out, they can hold memory addresses."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _to_rgb(image, name, max_pixels)
    except InvalidImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise _too_large(name, "far too many", max_pixels) from e
    except UnidentifiedImageError as e:
        raise InvalidImageError(
            f"{name} is no picture: it {_describe(data)}. A file in one of the formats "
            f"{', '.join(FORMATS)} fits. Convert it, or check that the download was complete."
        ) from e
    except Exception as e:  # decoders meet damaged bytes with many kinds of exception
        raise _damaged(name) from e


def _damaged(name: str) -> InvalidImageError:
    return InvalidImageError(
        f"{name} is damaged or cut short. A complete picture file fits. "
        "Download or export the picture again."
    )


def _too_large(name: str, pixels: str, max_pixels: int) -> InvalidImageError:
    return InvalidImageError(
        f"{name} has {pixels} pixels. At most {max_pixels:,} are accepted. "
        "Shrink it first, or call load_image(source, max_pixels=...) if you trust it."
    )


def _describe(data: bytes) -> str:
    """What the bytes look like, for an error message."""
    if not data:
        return "is empty"
    if data.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the picture itself"
    if data[4:8] == b"ftyp":
        return "is a HEIC or AVIF picture or a video"
    if data.startswith(b"%PDF"):
        return "is a PDF document"
    try:
        data[:1024].decode("ascii")
        return "is text"
    except UnicodeDecodeError:
        return f"starts with the bytes {data[:8].hex(' ')}"


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """First frame, upright, 8-bit RGB."""
    width, height = image.size
    if width < 1 or height < 1:
        raise InvalidImageError(
            f"{name} is {width} x {height} pixels. At least 1 x 1 fits. Check how it was made."
        )
    if width * height > max_pixels:
        raise _too_large(name, f"{width * height:,}", max_pixels)
    if image.mode in ("I", "F"):
        raise InvalidImageError(
            f"{name} holds 32-bit values of unknown range (Pillow mode {image.mode}). 8-bit or "
            "16-bit pixels fit. Scale it, for example: Image.fromarray(values.astype('uint8'))"
        )
    try:
        image.load()
        if image.mode == "P":  # straight to RGB, Pillow warns of the transparency it drops
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        image = _upright(image)
        if image.mode.startswith("I;16"):
            # convert("RGB") would clip at 255 and turn nearly all of the picture white.
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    except Exception as e:  # decoders meet damaged pixels with many kinds of exception
        raise _damaged(name) from e


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF is no reason to refuse the pixels
        return image
