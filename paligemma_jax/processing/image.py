"""Images: anything a user may hold -> upright RGB -> the float32 pixels SigLIP was trained on.

A checkpoint brings its method: big_vision's were trained on bilinear resizing truncated to 8 bit,
Hugging Face's processor resizes bicubically. Both squash to a square and map [0, 255] to [-1, 1].

big_vision resizes with `tf.image.resize(method="bilinear", antialias=True)` and truncates the
result to uint8, so a difference in the last bit can cost a whole gray level. TensorFlow's weights
and sums are formed in its order and precision therefore (kernel `ScaleAndTranslate`, CPU).
"""

import dataclasses
import functools
import io
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from paligemma_jax.errors import ConfigError, InvalidImageError

Data: TypeAlias = bytes | bytearray | memoryview
ImageSource: TypeAlias = str | os.PathLike[str] | Data | IO[bytes] | Image.Image | np.ndarray

MAX_PIXELS = 89_478_485  # Pillow's own threshold of suspicion: a quarter GiB of 8-bit RGB
MAX_BYTES = 512 * 2**20
# Only widely used decoders are reachable from untrusted bytes; Pillow has many others.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_CHUNK = 1 << 16
_ARRAY = "uint8 in 0..255 or float in 0..1, shaped [height, width] or [height, width, 1 | 3 | 4]"


def load_image(
    source: ImageSource, *, allow_urls: bool = False, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The image as `PIL.Image` in mode RGB; raises InvalidImageError for what is no image.

    Accepts a path, the bytes of a file, a binary file object, a PIL image, a numpy array (in RGB
    order; see `image_from_array`), or, with `allow_urls`, an http(s) address. EXIF orientation is
    applied, animations give their first frame, 16-bit gray keeps its high byte, transparency is
    dropped (as in big_vision and Hugging Face), embedded color profiles are ignored. More than
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
        "Expected a path, bytes, a binary file, a PIL image or a numpy array, got "
        f"{type(source).__name__}."
    )


def image_from_array(array: np.ndarray) -> Image.Image:
    """RGB `PIL.Image` of uint8 (0..255) or floating (0..1) [H, W], [H, W, 1], [H, W, 3], [H, W, 4].

    Channels are red, green, blue and an alpha that is dropped; floats are rounded to 8 bit. Raises
    InvalidImageError for anything else: the range of a float array is never guessed.
    """
    gray = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    color = array.ndim == 3 and array.shape[2] in (3, 4)
    if not (gray or color) or array.size == 0:
        raise InvalidImageError(
            f"Expected an array of {_ARRAY}; got shape {array.shape}.{_advice(array)}"
        )
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also true for NaN
            raise InvalidImageError(
                f"Expected floats from 0 to 1, or uint8, got floats from {low:g} to {high:g}. "
                "Convert them, for example: array.astype('uint8')"
            )
        array = np.round(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InvalidImageError(
            f"Expected an array of {_ARRAY}; got {array.dtype}, which has no known range. Convert "
            "it, for example: array.astype('uint8')"
        )
    if gray:
        return Image.fromarray(array.reshape(array.shape[:2])).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(array[:, :, :3]))


def _advice(array: np.ndarray) -> str:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return " Channels come last; use: array.transpose(1, 2, 0)"
    return " For several images pass a list: list(array)" if array.ndim == 4 else ""


def _opener() -> urllib.request.OpenerDirector:
    """An opener for http(s) alone: `build_opener` would also follow redirects to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def download(url: str, *, max_bytes: int, timeout: float = 30.0) -> bytes:
    """Body behind an http(s) `url`; InvalidImageError if it is unreachable, too large or too slow.

    `timeout` in seconds bounds the whole transfer. Private addresses are not filtered: let only
    trusted people choose the address.
    """
    deadline = time.monotonic() + timeout
    body = bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "paligemma-jax"})
        with _opener().open(request, timeout=timeout) as response:
            # read1 returns what has arrived, so that a trickle cannot outlast the deadline.
            while chunk := response.read1(_CHUNK):
                body += chunk
                if len(body) > max_bytes:
                    raise InvalidImageError(
                        f"Expected at most {max_bytes:,} bytes, but {url} sends more. Download "
                        "it and pass a smaller copy."
                    )
                if time.monotonic() > deadline:
                    raise TimeoutError
    except TimeoutError as e:
        raise InvalidImageError(
            f"{url} did not arrive within {timeout:g} seconds. Download it and pass its path."
        ) from e
    except (OSError, HTTPException, ValueError) as e:
        if isinstance(e, InvalidImageError):
            raise
        reason = f"HTTP status {e.code}" if isinstance(e, urllib.error.HTTPError) else "no answer"
        raise InvalidImageError(
            f"{url} could not be read ({reason}). Open it in a browser, or download the image and "
            "pass its path."
        ) from e
    return bytes(body)


def _from_url(url: str, allow_urls: bool) -> bytes:
    if not allow_urls:
        raise InvalidImageError(
            f"{url} is an address, and reading from the network is off. Pass the image that "
            "load_image(address, allow_urls=True) downloads (--allow-urls)."
        )
    return download(url, max_bytes=MAX_BYTES)


def _from_path(path: Path) -> bytes:
    path = path.expanduser()
    try:
        # A pipe or device could block for ever, so only regular files are opened.
        if not path.is_file():
            kind = "is no regular file" if path.exists() else "does not exist"
            raise InvalidImageError(f"The image {str(path)!r} {kind}.")
        with path.open("rb") as file:
            return _from_file(file)
    except (OSError, ValueError) as e:  # ValueError: a null byte in the path
        if isinstance(e, InvalidImageError):
            raise
        reason = e.strerror if isinstance(e, OSError) else "not a valid path"
        raise InvalidImageError(f"The image {str(path)!r} cannot be read: {reason}.") from e


def _from_file(file: Any) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if not isinstance(data, bytes):
        raise InvalidImageError(
            "Expected bytes from the file object, got text. Open it with: open(path, 'rb')"
        )
    if len(data) > MAX_BYTES:
        raise InvalidImageError(
            f"Expected an image file of at most {MAX_BYTES:,} bytes. Save it compressed or at a "
            "lower resolution."
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
            f"{name} is not an image: it {_describe(data)}. Expected a file in one of the formats "
            f"{', '.join(FORMATS)}."
        ) from e
    except Exception as e:  # decoders meet damaged bytes with many kinds of exception
        raise _damaged(name) from e


def _damaged(name: str) -> InvalidImageError:
    return InvalidImageError(f"{name} is damaged or cut short. Download or export the image again.")


def _too_large(name: str, pixels: str, max_pixels: int) -> InvalidImageError:
    return InvalidImageError(
        f"Expected at most {max_pixels:,} pixels, got {pixels} in {name}. Shrink it first, or "
        "call load_image(source, max_pixels=...) if you trust it."
    )


def _describe(data: bytes) -> str:
    """What the bytes look like, for an error message."""
    if not data:
        return "is empty"
    if data.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the image itself"
    if data[4:8] == b"ftyp":
        return "is a HEIC or AVIF image or a video"
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
        raise InvalidImageError(f"Expected at least one pixel, got {width} x {height} in {name}.")
    if width * height > max_pixels:
        raise _too_large(name, f"{width * height:,}", max_pixels)
    if image.mode in ("I", "F"):
        raise InvalidImageError(
            f"Expected 8-bit or 16-bit pixels, got 32-bit values of unknown range in {name} "
            f"(Pillow mode {image.mode}). Scale it: Image.fromarray(values.astype('uint8'))"
        )
    try:
        image.load()
        if image.mode == "P":  # straight to RGB, Pillow warns of the transparency it drops
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        image = _upright(image)
        if image.mode.startswith("I;16"):
            # convert("RGB") would clip at 255 and turn nearly all of the image white.
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    except Exception as e:  # decoders meet damaged pixels with many kinds of exception
        raise _damaged(name) from e


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF is no reason to refuse the pixels
        return image


Span = tuple[int, np.ndarray]  # first source index, float32 weights of it and the following ones


@functools.lru_cache(maxsize=64)
def triangle_spans(input_size: int, output_size: int) -> tuple[Span, ...]:
    """For each output position, the first source index and the normalized triangle weights.

    The filter is one source pixel wide when enlarging and one output pixel wide when shrinking.
    """
    one, half = np.float32(1), np.float32(0.5)
    inverse_scale = one / (np.float32(output_size) / np.float32(input_size))
    radius = max(inverse_scale, one)
    spans = []
    for position in range(output_size):
        center = (np.float32(position) + half) * inverse_scale
        first = min(max(int(np.ceil(center - radius - half)), 0), input_size - 1)
        last = min(max(int(np.floor(center + radius - half)), 0), input_size - 1)
        sources = np.arange(first, last + 1, dtype=np.float32)
        distance = np.abs((sources + half - center) * (one / radius))
        weights = np.maximum(one - distance, np.float32(0))
        total = np.add.accumulate(weights)[-1]  # np.sum adds pairwise; TensorFlow does not
        weights *= one / total
        weights.setflags(write=False)  # they are shared
        spans.append((first, weights))
    return tuple(spans)


def _resample_rows(pixels: np.ndarray, output_size: int) -> np.ndarray:
    """Resamples axis 0 of any real array to float32[output_size, ...]."""
    output = np.zeros((output_size, *pixels.shape[1:]), np.float32)
    product = np.empty(pixels.shape[1:], np.float32)
    for row, (first, weights) in zip(output, triangle_spans(len(pixels), output_size), strict=True):
        for source, weight in zip(pixels[first:], weights, strict=False):
            np.multiply(source, weight, out=product, dtype=np.float32)
            row += product
    return output


def resize_bilinear_antialias(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes [H, W, C] to float32 [height, width, C]; values stay on the scale of the input.

    Equals TensorFlow's CPU result bit for bit on the golden images. Memory beyond the input and
    the result: one float32 [height, W, C].
    """
    rows = _resample_rows(pixels, height)
    columns = _resample_rows(np.ascontiguousarray(rows.transpose(1, 0, 2)), width)
    return np.ascontiguousarray(columns.transpose(1, 0, 2))


BILINEAR = "bilinear-antialias-truncated"
BICUBIC = "bicubic-pil"


def resize_bilinear(image: Image.Image, size: int) -> np.ndarray:
    """big_vision's `resize(size, antialias=True)|value_range(-1, 1)`, bit for bit.

    Source: google-research/big_vision, pp/ops_image.py; the resized image is truncated to uint8.
    """
    resized = resize_bilinear_antialias(np.asarray(image), size, size)
    pixels = np.clip(resized, 0, 255).astype(np.uint8).astype(np.float32)
    return pixels / 255 * 2 - 1


def resize_bicubic(image: Image.Image, size: int) -> np.ndarray:
    """Hugging Face's SiglipImageProcessor (PIL backend), bit for bit.

    Bicubic with antialias on 8-bit pixels, then x / 255 and (x - 0.5) / 0.5.
    """
    resized = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    unit = (resized * (1 / 255)).astype(np.float32)  # multiplied in float64, as there
    return (unit - np.float32(0.5)) / np.float32(0.5)


_METHODS = {BILINEAR: resize_bilinear, BICUBIC: resize_bicubic}


@dataclasses.dataclass(frozen=True)
class ImagePreprocessing:
    """Any image -> f32[size, size, 3] in [-1, 1]; aspect ratio not kept.

    `size` is in pixels, `method` is BILINEAR (big_vision) or BICUBIC (Hugging Face).
    """

    size: int
    method: str = BILINEAR

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(
                f"Expected an image size of 1 pixel or more, got {self.size!r}. Take it from the "
                "checkpoint: config.img.image_size"
            )
        if self.method not in _METHODS:
            raise ConfigError(
                f"Expected a resizing method of {' or '.join(_METHODS)}, got {self.method!r}."
            )

    def __call__(self, source: ImageSource, *, allow_urls: bool = False) -> np.ndarray:
        """Loads (see `load_image`) and resizes; raises InvalidImageError."""
        return self.preprocess(load_image(source, allow_urls=allow_urls))

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """f32[size, size, 3] in [-1, 1] of an RGB image that `load_image` gave."""
        return _METHODS[self.method](image, self.size)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImagePreprocessing":
        """Inverse of `to_dict`; raises ConfigError for a missing field or an unknown method."""
        try:
            return cls(size=values["size"], method=values["method"])
        except KeyError as e:
            raise ConfigError(
                f"The image preprocessing {dict(values)} lacks {e}. Convert the checkpoint again: "
                "paligemma convert SOURCE TARGET"
            ) from e
