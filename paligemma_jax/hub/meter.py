"""How far a download is, for whoever wants to know."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all


class Meter:
    """Counts the bytes of several files; `total` may grow when a size becomes known."""

    def __init__(self, progress: Progress, total: int = 0):
        self._progress = progress
        self.total = total
        self.done = 0
        self._name = ""

    def start(self, name: str) -> None:
        """`name` is what comes now."""
        self._name = name
        self.add(0)

    def add(self, count: int) -> None:
        """`count` bytes more are there; less than nothing where some were thrown away."""
        self.done += count
        self._progress(self._name, self.done, max(self.total, self.done))


@contextlib.contextmanager
def shown(progress: Progress | None, title: str) -> Iterator[Progress]:
    """`progress`, or a bar of its own on standard error where a person may be watching.

    HF_HUB_DISABLE_PROGRESS_BARS=1 shows none.
    """
    if progress is not None:
        yield progress
        return
    disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").lower() in ("1", "true", "on")
    if disabled or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield lambda name, done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit="B", unit_scale=True, file=sys.stderr) as bar:

        def update(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.set_postfix_str(name, refresh=False)

        yield update
