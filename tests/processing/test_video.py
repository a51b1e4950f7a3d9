"""Frames of video files: which ones, from which kinds of files, and what is refused."""

import builtins
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_jax.errors import ConfigError, InvalidImageError, MissingExtraError
from paligemma_jax.processing import video
from paligemma_jax.processing.video import choose_frames, read_frames

FRAMES = 48
STEP = 5  # grey levels from frame to frame
TWO_SECONDS = [i / 24 for i in range(FRAMES)]


def write_video(codec: str = "libx264", container: str = "mp4", **options: str) -> bytes:
    """Two seconds of 64 x 48 pixels: frame i is all of grey level 5 i; a key frame every 12."""
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    data = io.BytesIO()
    with av.open(data, "w", format=container) as output:
        stream = output.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.gop_size = 64, 48, 12
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for i in range(FRAMES):
            grey = np.full((48, 64, 3), STEP * i, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        output.mux(stream.encode(None))
    return data.getvalue()


def numbers(frames: list[Any]) -> list[int]:
    """Which frames they are."""
    assert all(frame.mode == "RGB" and frame.size == (64, 48) for frame in frames)
    return [round(float(np.asarray(frame).mean()) / STEP) for frame in frames]


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return write_video(bf="3")  # with frames that are decoded in another order than shown


def test_evenly_spread_frames_are_middles_of_equal_parts():
    assert choose_frames(TWO_SECONDS, 4) == [6, 18, 30, 42]
    assert choose_frames(TWO_SECONDS, 1) == [24]
    assert choose_frames(TWO_SECONDS, 48) == list(range(48))
    assert choose_frames(TWO_SECONDS, 16) == list(range(1, 48, 3))


def test_strides_are_big_vision_s():
    """From the first frame on; a clip that is too short comes again in time."""
    assert choose_frames(TWO_SECONDS, 6, stride=7) == [0, 7, 14, 21, 28, 35]
    assert choose_frames(TWO_SECONDS, 8, stride=9) == [0, 9, 18, 27, 36, 45, 0, 9]
    assert choose_frames(TWO_SECONDS, 3, stride=70) == [0, 0, 0]


def test_seconds_take_the_frame_on_screen():
    assert choose_frames(TWO_SECONDS, 4, seconds=0.5) == [0, 12, 24, 36]
    assert choose_frames(TWO_SECONDS, 5, seconds=0.5) == [0, 12, 24, 36, 0]
    assert choose_frames([0.0, 0.1, 0.9, 1.0], 5, seconds=0.25) == [0, 1, 1, 1, 3]
    assert choose_frames([5.0, 5.5], 3, seconds=0.4) == [0, 0, 1]
    assert choose_frames([5.0], 2, seconds=0.4) == [0, 0]


@pytest.mark.parametrize("options", [{}, {"stride": 3}, {"seconds": 1.0}])
def test_short_clips_come_again(options: dict[str, Any]):
    times = [0.0, 1.0, 2.0]
    repeated = choose_frames(times, 7, **options)
    assert repeated == ([0] * 7 if "stride" in options else [0, 1, 2, 0, 1, 2, 0])


@pytest.mark.parametrize(
    "codec, container, options",
    [
        ("libx264", "mp4", {"bf": "3"}),
        ("libx264", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("libx264", "matroska", {"bf": "3"}),
        ("libx264", "mpegts", {"bf": "3"}),
        ("libx264", "avi", {"bf": "2"}),  # holds no times of presentation
        ("libvpx-vp9", "webm", {"deadline": "realtime"}),
        ("gif", "gif", {}),
    ],
    ids=["mp4", "mp4-fragments", "mkv", "ts", "avi", "webm", "gif"],
)
def test_every_kind_of_file(codec: str, container: str, options: dict[str, str]):
    data = write_video(codec, container, **options)
    assert numbers(read_frames(data, 8)) == [3, 9, 15, 21, 27, 33, 39, 45]
    assert numbers(read_frames(data, 6, stride=9)) == [0, 9, 18, 27, 36, 45]
    assert numbers(read_frames(data, 5, seconds=0.5)) == [0, 12, 24, 36, 0]


def test_path_and_bytes_are_the_same(mp4: bytes, tmp_path: Path):
    (tmp_path / "clip.mp4").write_bytes(mp4)
    frames = read_frames(tmp_path / "clip.mp4")
    assert len(frames) == 16 and numbers(frames) == numbers(read_frames(mp4))
    assert numbers(read_frames(str(tmp_path / "clip.mp4"), 2)) == [12, 36]


def test_repeated_frames_are_one_picture(mp4: bytes):
    """So that they are resized and encoded once."""
    frames = read_frames(mp4, 6, stride=30)
    assert numbers(frames) == [0, 30, 0, 30, 0, 30]
    assert frames[0] is frames[2] is frames[4] and frames[0] is not frames[1]


class Counting:
    """A container that counts the frames it has decoded."""

    def __init__(self, container: Any):
        self.container, self.decoded = container, 0

    def seek(self, *args: Any, **kwargs: Any) -> None:
        self.container.seek(*args, **kwargs)

    def decode(self, stream: Any) -> Any:
        for frame in self.container.decode(stream):
            self.decoded += 1
            yield frame


def test_only_what_leads_to_the_frames_is_decoded(mp4: bytes):
    file = io.BytesIO(mp4)
    index = video._read_index(file, "it")
    assert len(index.times) == FRAMES and len(index.keys) == 4
    with video._video(file, "it") as (container, stream):
        counting = Counting(container)
        found = video._from_key_frames(counting, stream, index, [2, 5, 38])
        assert [number for number, _ in found] == [2, 5, 38]
    assert counting.decoded == 6 + 3  # 0 to 5, and 36 to 38


def test_frames_are_upright(mp4: bytes):
    """A telephone held upright writes the image lying, and a matrix that turns it clockwise."""
    words = [0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30]
    straight = [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30]
    old, new = (b"".join(w.to_bytes(4, "big", signed=True) for w in m) for m in (straight, words))
    header = mp4.index(b"tkhd")
    turned = mp4[:header] + mp4[header:].replace(old, new, 1)
    assert read_frames(turned, 1)[0].size == (48, 64)


@pytest.mark.parametrize("part", [0.3, 0.9])
@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_files_cut_short(container: str, part: float):
    data = write_video("libx264", container)
    with pytest.raises(InvalidImageError, match="cut short"):
        read_frames(data[: int(len(data) * part)])


def test_cut_short_with_the_table_of_contents_in_front():
    data = write_video(movflags="faststart")
    with pytest.raises(InvalidImageError, match="cut short"):
        read_frames(data[: len(data) - 200])


@pytest.mark.parametrize(
    "data",
    [b"", b"not a video " * 40, b"\x89PNG\r\n\x1a\n" + bytes(99)],
    ids=["empty", "text", "png"],
)
def test_what_is_no_video(data: bytes, tmp_path: Path):
    pytest.importorskip("av")
    (tmp_path / "thing.mp4").write_bytes(data)
    for source in (data, tmp_path / "thing.mp4"):
        with pytest.raises(InvalidImageError, match="no video"):
            read_frames(source)


def test_playlists_are_not_followed(tmp_path: Path):
    """They can name any file and address."""
    (tmp_path / "part.ts").write_bytes(write_video("libx264", "mpegts"))
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:2", "#EXTINF:2,", "part.ts", "#EXT-X-ENDLIST", ""]
    (tmp_path / "list.m3u8").write_text("\n".join(lines))
    with pytest.raises(InvalidImageError, match="no video"):
        read_frames(tmp_path / "list.m3u8")


def test_sources_that_do_not_fit(tmp_path: Path):
    pytest.importorskip("av")
    with pytest.raises(InvalidImageError, match="does not exist"):
        read_frames(tmp_path / "none.mp4")
    with pytest.raises(InvalidImageError, match="does not exist"):
        read_frames("https://example.com/clip.mp4")
    with pytest.raises(InvalidImageError, match="no regular file"):
        read_frames(tmp_path)
    with pytest.raises(InvalidImageError, match="got list"):
        read_frames([1, 2])  # type: ignore[arg-type]


def test_large_frames_are_refused(mp4: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(InvalidImageError, match="got 3,072"):
        read_frames(mp4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"count": 0}, "got 0"),
        ({"count": 2.5}, "got 2.5"),
        ({"stride": 0}, "stride.*got 0"),
        ({"seconds": 0.0}, "got 0.0"),
        ({"seconds": float("nan")}, "got nan"),
        ({"stride": 2, "seconds": 1.0}, "stride=2 and seconds"),
    ],
)
def test_impossible_numbers(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        read_frames(b"", **options)


def test_without_pyav(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def hide(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hide)
    with pytest.raises(MissingExtraError, match=r'pip install "paligemma-jax\[video\]"'):
        read_frames(b"something")
