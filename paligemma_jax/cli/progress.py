"""Progress bars on standard error."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator

DELAY = 0.7  # seconds; nothing is shown for what is done sooner


def wanted(args: argparse.Namespace) -> bool:
    """Whether to show progress: as asked, else where standard error is a terminal."""
    return sys.stderr.isatty() if args.progress is None else args.progress


@contextlib.contextmanager
def byte_bar(args: argparse.Namespace, title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields the function to call with (what is being done, bytes done, bytes in all)."""
    if not wanted(args):
        yield lambda name, done, total: None
        return
    from tqdm import tqdm

    delay = 0 if args.progress else DELAY
    with tqdm(
        desc=title, unit="B", unit_scale=True, file=sys.stderr, delay=delay, leave=not delay
    ) as bar:

        def update(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done < total:
                bar.set_postfix_str(name.rsplit("/", 2)[-1], refresh=False)

        yield update


@contextlib.contextmanager
def picture_bar(args: argparse.Namespace, total: int) -> Iterator[Callable[[int], None]]:
    """Yields the function to call with the number of pictures done since the last call."""
    if total < 2 or not wanted(args):
        yield lambda count: None
        return
    from tqdm import tqdm

    delay = 0 if args.progress else DELAY
    with tqdm(
        total=total, desc="pictures", unit="picture", file=sys.stderr, delay=delay, leave=not delay
    ) as bar:
        yield lambda count: (bar.update(count), None)[1]


@contextlib.contextmanager
def count_bar(args: argparse.Namespace, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields the function to call with how many are done, and how many there are."""
    if not wanted(args):
        yield lambda done, total: None
        return
    from tqdm import tqdm

    delay = 0 if args.progress else DELAY
    with tqdm(unit=unit, file=sys.stderr, delay=delay, leave=not delay) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextlib.contextmanager
def status(args: argparse.Namespace, text: str | None) -> Iterator[None]:
    """Says what takes long while it does, on a terminal; nothing if `text` is None."""
    if text is None or not (wanted(args) and sys.stderr.isatty()):
        yield
        return
    print(f"{text} ...", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\033[2K", end="\r", file=sys.stderr, flush=True)
