"""Frames of a video file as images; needs PyAV, the extra "video".

big_vision gives a model 16 frames (8 for MSVD) of a clip, taken every 30 (ActivityNet captions), 70
(ActivityNet questions), 9 (MSR-VTT), 7 (VATEX) or 26 (MSVD) frames from the first on; a clip that
is too short is repeated in time. The frames are several images of one prompt. Its reader was not
published, nor any checkpoint fine-tuned on videos, so the default here is another: frames spread
evenly over the whole video.
"""

import bisect
import contextlib
import dataclasses
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

from PIL import Image

from paligemma_jax.errors import ConfigError, InvalidImageError, MissingExtraError
from paligemma_jax.processing.image import MAX_PIXELS

FRAMES = 16  # of a clip, in big_vision's video configurations

# Containers only. FFmpeg's playlist formats (HLS, DASH, concat) can name further files and
# addresses, and its image formats are load_image's.
CONTAINERS = "mov,mp4,m4v,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"

VideoSource: TypeAlias = str | os.PathLike[str] | bytes


def read_frames(
    source: VideoSource,
    count: int = FRAMES,
    *,
    stride: int | None = None,
    seconds: float | None = None,
) -> list[Image.Image]:
    """`count` upright RGB frames of a video, in order; only what leads to them is decoded.

    Args:
      source: the path of a file, or its bytes.
      count: how many; a short video is repeated until there are so many (see `choose_frames`).
      stride: take every so manieth frame from the first on, as big_vision did.
      seconds: take the frame on screen every so many seconds from the first on.
        Without either, the middles of `count` equal parts of the video are taken.

    Raises:
      InvalidImageError: for what is no video, is damaged or cut short.
      MissingExtraError: without PyAV.
    """
    _check_numbers(count, stride, seconds)
    name = f"the data of {len(source):,} bytes" if isinstance(source, bytes) else str(source)
    with _open(source, name) as file:
        index = _read_index(file, name)
        chosen = choose_frames(index.times, count, stride=stride, seconds=seconds)
        frames = _decode(file, name, index, sorted(set(chosen)))
    return [frames[number] for number in chosen]


def choose_frames(
    times: Sequence[float],
    count: int,
    *,
    stride: int | None = None,
    seconds: float | None = None,
) -> list[int]:
    """Which `count` frames of a video `read_frames` takes; `times` (s) are ascending, one a frame.

    Evenly: frame floor((i + 1/2) n / count) of n. With `stride`: 0, stride, 2 stride, ... With
    `seconds`: the frames on screen at 0, seconds, 2 seconds, ... after the first. If the video ends
    before `count` frames, those that there are come again from the first on, as in big_vision.
    """
    number = len(times)
    if stride is not None:
        found = list(range(0, number, stride))
    elif seconds is not None:
        # A frame stays for as long as the one before it did.
        end = times[-1] + (times[-1] - times[-2] if number > 1 else 0)
        found = [0]
        while len(found) < count and (moment := times[0] + len(found) * seconds) < end - 1e-6:
            found.append(bisect.bisect_right(times, moment + 1e-6) - 1)
    elif number < count:
        found = list(range(number))
    else:
        found = [(2 * i + 1) * number // (2 * count) for i in range(count)]
    return [found[i % len(found)] for i in range(count)]


def _check_numbers(count: int, stride: int | None, seconds: float | None) -> None:
    if stride is not None and seconds is not None:
        raise ConfigError(f"Expected stride or seconds, got {stride=} and {seconds=}.")
    for name, value, kind in [("count", count, int), ("stride", stride, int)]:
        if value is not None and (not isinstance(value, kind) or value < 1):
            raise ConfigError(f"Expected {name} of at least 1, a whole number, got {value!r}.")
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"Expected seconds above 0, got {seconds!r}.")


@contextlib.contextmanager
def _open(source: VideoSource, name: str) -> Iterator[IO[bytes]]:
    """The file itself: FFmpeg never sees a name, which it could take for an address."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    if not isinstance(source, str | os.PathLike):
        raise InvalidImageError(
            "Expected the path of a video file, or its bytes, got "
            f"{type(source).__name__}. Pass frames that are images already as a list."
        )
    path = Path(source).expanduser()
    if not path.is_file():  # a pipe or device could block for ever
        kind = "is no regular file" if path.exists() else "does not exist"
        raise InvalidImageError(f"The video {name!r} {kind}.")
    try:
        file = path.open("rb")
    except OSError as e:
        raise InvalidImageError(f"The video {name!r} cannot be read: {e.strerror}.") from e
    with file:
        yield file


@contextlib.contextmanager
def _video(file: IO[bytes], name: str) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and its first video stream; its errors become ours."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError as e:
        raise MissingExtraError("Reading a video file", "video") from e
    file.seek(0)
    try:
        with av.open(file, container_options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.video:
                raise InvalidImageError(
                    f"Expected a video file, got {container.format.long_name} without a video "
                    f"stream: {name}."
                )
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            _check_size(name, stream.width, stream.height)
            yield container, stream
    except InvalidImageError:
        raise
    except (FFmpegError, OSError, ValueError) as e:
        raise InvalidImageError(
            f"Expected a complete video file such as MP4, WebM, MKV, MOV or AVI; {name} is no "
            "video, or is damaged or cut short."
        ) from e


@dataclasses.dataclass(frozen=True)
class _Index:
    """What the packets tell of the frames, in the order in which they are shown.

    `pts` and `keys` are in the stream's unit of time; empty where a file does not hold them, and
    frames can only be counted.
    """

    times: tuple[float, ...]  # seconds
    pts: tuple[int, ...]
    keys: tuple[int, ...]  # pts of key frames, from which decoding can start


def _read_index(file: IO[bytes], name: str) -> _Index:
    """Reads the packets of the video without decoding any."""
    with _video(file, name) as (container, stream):
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        if not packets or any(p.is_corrupt for p in packets) or len(packets) < stream.frames:
            raise _cut_short(name)
        pts = [p.pts for p in packets]
        # AVI stores no times; FFmpeg makes some up, in the order of decoding.
        if container.format.name == "avi" or None in pts or len(set(pts)) < len(pts):
            rate = float(stream.average_rate or stream.base_rate or 25)
            return _Index(tuple(i / rate for i in range(len(packets))), (), ())
        pts.sort()
        times = tuple(float(t * stream.time_base) for t in pts)
        # Matroska (MKV, WebM) keeps no number of frames, but often how long each stream is.
        length = _seconds(stream.metadata.get("DURATION", ""))
        frame = (times[-1] - times[0]) / max(len(times) - 1, 1)
        if times[-1] + 4 * frame < length:
            raise _cut_short(name)
        return _Index(times, tuple(pts), tuple(sorted(p.pts for p in packets if p.is_keyframe)))


def _seconds(clock: str) -> float:
    """Seconds of "00:01:02.5"; 0.0 for anything else."""
    try:
        hours, minutes, seconds = clock.strip("\0 ").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def _decode(
    file: IO[bytes], name: str, index: _Index, wanted: Sequence[int]
) -> dict[int, Image.Image]:
    """The frames of ascending numbers `wanted`."""
    found: dict[int, Image.Image] = {}
    if index.keys:
        with _video(file, name) as (container, stream):
            for number, frame in _from_key_frames(container, stream, index, wanted):
                found[number] = _to_image(frame, name)
    left = {number for number in wanted if number not in found}
    if left:  # no times, or the container cannot jump to them
        with _video(file, name) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if number in left:
                    found[number] = _to_image(frame, name)
                if number >= max(left):
                    break
    if len(found) < len(wanted):
        raise _cut_short(name)
    return found


def _from_key_frames(
    container: Any, stream: Any, index: _Index, wanted: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """Jumps to the key frame before each wanted frame, unless decoding is past it already."""
    reached = index.keys[0]
    frames = container.decode(stream)
    shown = None
    for number in wanted:
        target = index.pts[number]
        key = index.keys[max(bisect.bisect_right(index.keys, target) - 1, 0)]
        if key > reached:
            container.seek(key, stream=stream)
            frames, shown = container.decode(stream), None
        while shown is None or shown.pts < target:
            following = next(frames, None)
            if following is None or following.pts is None:
                break
            if following.pts > target and shown is not None:
                # A packet that shows nothing (VP8 has such): the frame before it stays.
                frames = itertools.chain([following], frames)
                break
            shown = following
            reached = following.pts
        if shown is not None and shown.pts <= target:
            yield number, shown


def _to_image(frame: Any, name: str) -> Image.Image:
    """Upright RGB: telephones store how they were held beside the frames."""
    _check_size(name, frame.width, frame.height)
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InvalidImageError(
            f"Expected frames of at most {MAX_PIXELS:,} pixels, got {width * height:,} in {name}."
        )


def _cut_short(name: str) -> InvalidImageError:
    return InvalidImageError(
        f"{name} is damaged or cut short: it ends before its last frame. Download or export it "
        "again."
    )
