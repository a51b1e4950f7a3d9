"""How far a run is: a bar on terminals and in notebooks, lines elsewhere."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping

Update = Callable[[int, int, Mapping[str, float]], None]  # step, steps in all, newest numbers


@contextlib.contextmanager
def progress_bar() -> Iterator[Update]:
    """A bar with loss, samples/s, tokens/s, MFU where it is known, and the time that is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets has a bar of text
        from tqdm.auto import tqdm

    with tqdm(unit="step", file=sys.stderr, smoothing=0.05) as bar:

        def update(step: int, total: int, values: Mapping[str, float]) -> None:
            bar.set_postfix_str(describe(values), refresh=False)
            if bar.total is None:  # the first step was compiled, which says nothing about the rest
                bar.reset(total)
                bar.initial = bar.n = step
                bar.refresh()
            else:
                bar.update(step - bar.n)

        yield update


@contextlib.contextmanager
def progress_lines() -> Iterator[Update]:
    """A line on standard error whenever there are new numbers."""
    last: list[object] = [None]

    def update(step: int, total: int, values: Mapping[str, float]) -> None:
        logged = values.get("samples_per_second")
        if logged != last[0] or step == total:
            last[0] = logged
            print(f"step {step}/{total} {describe(values)}", file=sys.stderr, flush=True)

    yield update


def describe(values: Mapping[str, float]) -> str:
    """The numbers of a step in one line."""
    shown = [f"loss {values['loss']:.4g}"]
    if "validation_loss" in values:
        shown.append(f"validation {values['validation_loss']:.4g}")
    if "samples_per_second" in values:
        shown.append(f"{values['samples_per_second']:.3g} samples/s")
        shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        shown.append(f"MFU {values['mfu']:.0%}")
    return ", ".join(shown)
