"""One large file published in pieces (`model.npz.part0`, `.part1`, ...), read as one."""

import io
import re
from pathlib import Path
from typing import Any

from paligemma_jax.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.+)\.part[_-]?(?P<number>\d+)$")


def find_parts(path: Path) -> list[Path]:
    """The pieces of `path` in order; `path` is the whole file's name or that of any piece.

    Empty when there are none. Raises CheckpointError when a number is missing between them.
    """
    match = _PART.match(path.name)
    stem = match["stem"] if match else path.name
    if not path.parent.is_dir():
        return []
    numbered: dict[int, Path] = {}
    for sibling in path.parent.iterdir():
        part = _PART.match(sibling.name)
        if part and part["stem"] == stem:
            numbered[int(part["number"])] = sibling
    if not numbered:
        return []
    wanted = range(min(min(numbered), 1), max(numbered) + 1)  # pieces count from 0 or from 1
    missing = [str(n) for n in wanted if n not in numbered]
    if missing:
        raise CheckpointError(
            f"{path.parent / stem} lacks its part {', '.join(missing)} of {len(wanted)}. All "
            "pieces in one directory fit. Download the missing ones next to the others."
        )
    return [numbered[n] for n in sorted(numbered)]


class PartsFile(io.RawIOBase):
    """Several files as one seekable, read-only file."""

    def __init__(self, paths: list[Path]):
        self._files = [path.open("rb") for path in paths]
        self._sizes = [path.stat().st_size for path in paths]
        self._position = 0

    @property
    def size(self) -> int:
        """Bytes of all parts together."""
        return sum(self._sizes)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise OSError(f"negative position {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads up to the end of the current part, as raw files may; 0 at the end of the last."""
        offset = self._position
        for file, size in zip(self._files, self._sizes, strict=True):
            if offset < size:
                file.seek(offset)
                count = file.readinto(memoryview(buffer)[: size - offset])
                self._position += count
                return count
            offset -= size
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
