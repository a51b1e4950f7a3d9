"""Images of any kind, from anywhere, and the pixels made of them."""

import http.server
import io
import json
import os
import random
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma_jax.errors import ConfigError, InvalidImageError
from paligemma_jax.processing.image import (
    BICUBIC,
    BILINEAR,
    ImagePreprocessing,
    download,
    load_image,
    resize_bilinear_antialias,
    triangle_spans,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def same(image: Image.Image, pixels: np.ndarray = PIXELS) -> None:
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_every_kind_of_source(tmp_path: Path):
    data = encoded(PICTURE)
    path = tmp_path / "wrong extension.jpg"
    path.write_bytes(data)
    for source in (str(path), path, data, bytearray(data), memoryview(data), io.BytesIO(data)):
        same(load_image(source))
    with path.open("rb") as file:
        same(load_image(file))
    same(load_image(PICTURE))
    same(load_image(PIXELS))


def test_pipe_without_seek():
    read, write = os.pipe()
    with os.fdopen(write, "wb") as file:
        file.write(encoded(PICTURE))
    with os.fdopen(read, "rb") as file:
        same(load_image(file))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG"])
def test_formats(format):
    options = {"lossless": True} if format == "WEBP" else {}
    image = load_image(encoded(PICTURE, format, **options))
    assert image.mode == "RGB" and image.size == (9, 6)
    if format in ("PNG", "BMP", "TIFF", "WEBP"):
        same(image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "RGBX"])
def test_modes(mode):
    image = load_image(PICTURE.convert(mode))
    assert image.mode == "RGB" and image.size == (9, 6)


def test_alpha_is_dropped():
    alpha = np.full((6, 9, 1), 0, np.uint8)
    transparent = Image.fromarray(np.concatenate([PIXELS, alpha], -1))
    same(load_image(encoded(transparent)))
    grey = Image.merge("LA", [PICTURE.convert("L"), Image.new("L", (9, 6))])
    same(load_image(encoded(grey)), np.asarray(PICTURE.convert("L").convert("RGB")))


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency():
    palette = PICTURE.quantize(16)
    wanted = np.asarray(palette.convert("RGB"))
    same(load_image(encoded(palette, transparency=bytes(range(16)))), wanted)
    same(load_image(encoded(palette, transparency=3)), wanted)


def test_cmyk_jpeg():
    grey = Image.new("CMYK", (8, 8), (0, 0, 0, 128))
    assert np.asarray(load_image(encoded(grey, "JPEG"))).std() == 0
    assert abs(int(np.asarray(load_image(encoded(grey, "JPEG")))[0, 0, 0]) - 127) < 3


def test_sixteen_bit_is_scaled_not_clipped():
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    wanted = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, -1)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    same(load_image(image), wanted)
    for format in ("PNG", "TIFF"):
        same(load_image(encoded(image, format)), wanted)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_unknown_range_is_refused(mode):
    with pytest.raises(InvalidImageError, match="unknown range"):
        load_image(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_gives_upright_pixels(orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = PICTURE.transpose(undo[orientation]) if orientation > 1 else PICTURE
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, exif=exif)
    same(load_image(data))
    same(load_image(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"]
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_is_ignored(exif):
    assert load_image(encoded(PICTURE, "JPEG", exif=exif)).size == (9, 6)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_first_frame(format):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    same(load_image(data), np.asarray(frames[0]))


def test_one_pixel():
    same(load_image(encoded(PICTURE.crop((0, 0, 1, 1)))), PIXELS[:1, :1])


@pytest.mark.parametrize(
    "array",
    [
        PIXELS[:, :, :1],
        PIXELS[:, :, 0],
        np.concatenate([PIXELS, PIXELS[:, :, :1]], -1),
        PIXELS[::-1, ::-2],
        PIXELS.astype(np.float32) / 255,
        PIXELS.astype(np.float64) / 255,
        (PIXELS / 255).astype(np.float16),
    ],
)
def test_arrays(array):
    image = np.asarray(load_image(array))
    values = np.round(np.asarray(array, np.float32) * 255) if array.dtype != np.uint8 else array
    if array.ndim == 2 or array.shape[2] == 1:
        values = np.repeat(values.reshape(6, 9, 1), 3, -1)
    np.testing.assert_allclose(image, values[:, :, :3], atol=1 if array.dtype == np.float16 else 0)


def test_read_only_array_is_left_alone():
    array = PIXELS.copy()
    array.flags.writeable = False
    same(load_image(array))


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\).*transpose\(1, 2, 0\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), "pass a list"),
        (np.zeros((8, 8, 2), np.uint8), r"\(8, 8, 2\)"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
        (np.zeros(8, np.uint8), r"\(8,\)"),
        (np.zeros((8, 8, 3), np.uint16), "uint16"),
        (np.zeros((8, 8, 3), bool), "bool"),
        (np.zeros((8, 8, 3), object), "object"),
        (np.full((8, 8, 3), 255.0), "from 255 to 255"),
        (np.full((8, 8, 3), -0.1), "from -0.1"),
        (np.full((8, 8, 3), np.nan), "nan"),
        (np.full((8, 8, 3), np.inf), "inf"),
    ],
)
def test_arrays_that_are_no_picture(array, message):
    with pytest.raises(InvalidImageError, match=message):
        load_image(array)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "is empty"),
        (b"Hello, I am a text file.", "is text"),
        (b"<!DOCTYPE html><html></html>", "is text"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"%PDF-1.7 \xff", "PDF"),
        (b"\0\0\0\x1cftypheic\0\0", "HEIC"),
        (b"\x00\x01\x02\xff" * 50, "starts with the bytes 00 01 02 ff"),
        (b"\x89PNG\r\n\x1a\n", "."),
        (encoded(PICTURE)[:60], "damaged or cut short"),
        (encoded(PICTURE, "JPEG")[:-200], "damaged or cut short"),
        (png(8, 8, b"no zlib"), "damaged or cut short"),
        (encoded(PICTURE, "ICO"), "formats"),
        (encoded(PICTURE, "EPS"), "is text|formats"),
    ],
)
def test_bytes_that_are_no_picture(tmp_path: Path, data, message):
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(InvalidImageError, match=message) as error:
            load_image(source)
        assert "0x" not in str(error.value)  # no memory addresses
    assert str(path) in str(error.value)


def test_flipped_bit_in_png_is_noticed():
    data = bytearray(encoded(PICTURE))
    data[50] ^= 1
    with pytest.raises(InvalidImageError):
        load_image(bytes(data))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 13_000, 100_000])
def test_bomb_is_refused_before_decoding(side):
    with pytest.raises(InvalidImageError, match="at most 89,478,485 pixels"):
        load_image(png(side, side))


@pytest.mark.filterwarnings("error")
def test_bomb_is_refused_when_warnings_are_errors():
    with pytest.raises(InvalidImageError, match="at most"):
        load_image(png(9_500, 9_500))


def test_pixel_limit_can_be_chosen():
    same(load_image(PICTURE, max_pixels=54))
    with pytest.raises(InvalidImageError, match="at most 53 pixels, got 54 "):
        load_image(PICTURE, max_pixels=53)


def test_size_zero_and_closed():
    with pytest.raises(InvalidImageError, match="0 x 5"):
        load_image(Image.new("RGB", (0, 5)))
    closed = Image.open(io.BytesIO(encoded(PICTURE)))
    closed.close()
    with pytest.raises(InvalidImageError):
        load_image(closed)


def test_paths_that_are_no_files(tmp_path: Path):
    with pytest.raises(InvalidImageError, match="does not exist"):
        load_image(tmp_path / "none.png")
    with pytest.raises(InvalidImageError, match="no regular file"):
        load_image(tmp_path)
    with pytest.raises(InvalidImageError):
        load_image("null\0byte")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InvalidImageError, match="no regular file"):
            load_image(tmp_path / "pipe")


@pytest.mark.parametrize("source", [None, 3, {"path": "x"}, object()])
def test_what_is_no_source(source):
    with pytest.raises(InvalidImageError, match="Expected a path"):
        load_image(source)


def test_text_file_object():
    source: Any = io.StringIO("text")
    with pytest.raises(InvalidImageError, match="'rb'"):
        load_image(source)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_one_kind_of_error(format):
    data, pick = encoded(PICTURE, format), random.Random(0)
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(pick.choice([1, 3, 20])):
            damaged[pick.randrange(len(data))] = pick.randrange(256)
        try:
            assert load_image(bytes(damaged), max_pixels=10**6).mode == "RGB"
        except InvalidImageError as error:
            assert "0x" not in str(error)


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    return file.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            return self.send_error(404)
        if self.path.startswith("/to-"):
            self.send_response(302)
            target = {
                "/to-picture": "/picture",
                "/to-ftp": "ftp://localhost/x",
                "/to-loop": "/to-loop",
            }
            self.send_header("Location", target[self.path])
            return self.end_headers()
        self.send_response(200)
        self.end_headers()
        try:
            if self.path == "/trickle":
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            self.wfile.write(picture() if self.path == "/picture" else b"x" * 10_000)
        except OSError:
            pass  # the client has gone, as it should

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_off_by_default(server):
    with pytest.raises(InvalidImageError, match="allow_urls=True"):
        load_image(f"{server}/picture")


@pytest.mark.parametrize("path", ["picture", "to-picture"])
def test_picture(server, path):
    image = load_image(f"{server}/{path}", allow_urls=True)
    np.testing.assert_array_equal(np.asarray(image), np.full((2, 3, 3), (255, 0, 0)))


@pytest.mark.parametrize(
    "path, message", [("missing", "404"), ("to-ftp", "read"), ("to-loop", "HTTP")]
)
def test_failures(server, path, message):
    with pytest.raises(InvalidImageError, match=message):
        load_image(f"{server}/{path}", allow_urls=True)


def test_not_a_picture(server):
    with pytest.raises(InvalidImageError, match="is text"):
        load_image(f"{server}/text", allow_urls=True)


def test_size_and_time_are_bounded(server):
    with pytest.raises(InvalidImageError, match="at most 9,999 bytes"):
        download(f"{server}/text", max_bytes=9_999)
    assert len(download(f"{server}/text", max_bytes=10_000)) == 10_000
    start = time.monotonic()
    with pytest.raises(InvalidImageError, match="within 0.3 seconds"):
        download(f"{server}/trickle", max_bytes=10_000, timeout=0.3)
    assert time.monotonic() - start < 3


def test_nobody_answers():
    with pytest.raises(InvalidImageError, match="no answer"):
        download("http://127.0.0.1:9/x", max_bytes=10)
    with pytest.raises(InvalidImageError):
        download("http://[bad", max_bytes=10)


@pytest.mark.parametrize("name", ["cow_down", "lilly_down", "up", "tall"])
def test_big_vision_golden_bit_for_bit(golden, name):
    with np.load(golden / "resize.golden.npz") as arrays:
        pixels, wanted = arrays[f"{name}/input"], arrays[f"{name}/output"]
    result = ImagePreprocessing(len(wanted), BILINEAR)(pixels)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("method", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (14, 14), (5, 90)])
def test_any_size(method, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    result = ImagePreprocessing(14, method)(pixels)
    assert result.shape == (14, 14, 3) and result.dtype == np.float32
    assert -1 <= result.min() and result.max() <= 1
    if shape == (1, 1):
        # TensorFlow's weights sum to 1 - 2**-24 in places, and truncation then costs a grey level.
        np.testing.assert_allclose(result, np.broadcast_to(result[0, 0], result.shape), atol=0.008)
    if shape == (14, 14):
        np.testing.assert_allclose(result, pixels / 127.5 - 1, atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_spans_lie_inside_and_sum_to_one(input_size, output_size):
    spans = triangle_spans(input_size, output_size)
    assert len(spans) == output_size
    for first, weights in spans:
        assert first >= 0 and first + len(weights) <= input_size
        assert weights.dtype == np.float32 and weights.min() >= 0
        assert abs(weights.sum() - 1) < 1e-6


def test_spans_are_made_once_and_shared():
    spans = triangle_spans(31, 7)
    assert triangle_spans(31, 7) is spans
    with pytest.raises(ValueError, match="read-only"):
        spans[0][1][0] = 2


def test_resize_is_separable_and_linear():
    pixels = np.random.default_rng(1).random((9, 7, 2)).astype(np.float32)
    turned = resize_bilinear_antialias(pixels.transpose(1, 0, 2), 5, 4).transpose(1, 0, 2)
    resized = resize_bilinear_antialias(pixels, 4, 5)
    np.testing.assert_allclose(resized, turned, atol=1e-6)
    np.testing.assert_allclose(resize_bilinear_antialias(2 * pixels, 4, 5), 2 * resized, atol=1e-6)


def test_bicubic_is_pillows(golden):
    with np.load(golden / "resize.golden.npz") as arrays:
        image = Image.fromarray(arrays["cow_down/input"])
    resized = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC))
    result = ImagePreprocessing(28, BICUBIC)(image)
    np.testing.assert_allclose(result, resized / 127.5 - 1, atol=1e-6)


def test_dict_round_trip():
    for method in (BILINEAR, BICUBIC):
        settings_ = ImagePreprocessing(448, method)
        assert (
            ImagePreprocessing.from_dict(json.loads(json.dumps(settings_.to_dict()))) == settings_
        )
    assert ImagePreprocessing(224).to_dict() == {
        "size": 224,
        "method": "bilinear-antialias-truncated",
    }


@pytest.mark.parametrize("values", [{}, {"size": 28}, {"size": 28, "method": "nearest"}])
def test_bad_settings(values):
    with pytest.raises(ConfigError, match="bicubic-pil|lacks"):
        ImagePreprocessing.from_dict(values)


@pytest.mark.parametrize("size", [0, -1, 2.5, "224"])
def test_bad_size(size):
    with pytest.raises(ConfigError, match="1 pixel or more"):
        ImagePreprocessing(size)
