"""Which entries of a size are measured, as narrowed by who asks."""

import dataclasses
from collections.abc import Sequence

from paligemma_jax.benchmark.cases import DecodeMemory
from paligemma_jax.benchmark.entry import Entry
from paligemma_jax.benchmark.implementation import Kind, Precision
from paligemma_jax.benchmark.models import find_model
from paligemma_jax.benchmark.sizes import SIZES
from paligemma_jax.errors import ConfigError


def entries(
    size: str,
    *,
    models: Sequence[str] | None = None,
    kinds: Sequence[Kind] | None = None,
    dtypes: Sequence[Precision] | None = None,
    repeats: int | None = None,
    quick: bool = False,
) -> list[Entry]:
    """What is measured at a size; the other arguments narrow or change that.

    A model or kind that the size does not have is measured as its first one is; `dtypes` stand in
    for an entry's own. Raises ConfigError for names that do not exist.
    """
    if size not in SIZES:
        raise ConfigError(f"There is no size {size!r}. {', '.join(SIZES)} fit.")
    chosen = SIZES[size]
    if models is not None:
        chosen = [entry for model in models for entry in _of_model(chosen, model)]
    for entry in chosen:
        find_model(entry.model)
    if kinds:
        chosen = _with_kinds(chosen, kinds)
    if dtypes:
        chosen = _with_dtypes(chosen, dtypes)
    if repeats:
        chosen = [dataclasses.replace(entry, repeats=repeats) for entry in chosen]
    return _quick(chosen) if quick else chosen


def _of_model(chosen: Sequence[Entry], model: str) -> list[Entry]:
    """The size's own entries of a model, else those of its first model."""
    own = [entry for entry in chosen if entry.model == model]
    like_first = [entry for entry in chosen if entry.model == chosen[0].model]
    return own or [dataclasses.replace(entry, model=model) for entry in like_first]


def _with_kinds(chosen: Sequence[Entry], kinds: Sequence[Kind]) -> list[Entry]:
    """Of each entry those of its own; those that a model has nowhere go into its first entry."""
    known = {(entry.model, kind) for entry in chosen for kind in entry.kinds}
    narrowed, begun = [], set()
    for entry in chosen:
        first = entry.model not in begun
        begun.add(entry.model)
        own = [k for k in kinds if k in entry.kinds or (first and (entry.model, k) not in known)]
        if own:
            narrowed.append(dataclasses.replace(entry, kinds=tuple(own)))
    return narrowed


def _with_dtypes(chosen: Sequence[Entry], dtypes: Sequence[Precision]) -> list[Entry]:
    """All of them, in the entries that do more than to decode with integers."""
    return [
        dataclasses.replace(entry, dtypes=tuple(dtypes), quantized=())
        for entry in chosen
        if entry.dtypes
    ]


def _quick(chosen: Sequence[Entry]) -> list[Entry]:
    """One repeat of each model's first entry, which has what matters most."""
    by_model: dict[str, Entry] = {}
    for entry in chosen:
        by_model.setdefault(entry.model, entry)
    return [
        dataclasses.replace(
            entry,
            kinds=tuple(kind for kind in entry.kinds if kind is not Kind.SCANNED),
            repeats=1,
            starts=0,
            once=(),
            ours_once=tuple(case for case in entry.ours_once if isinstance(case, DecodeMemory)),
        )
        for entry in by_model.values()
    ]
