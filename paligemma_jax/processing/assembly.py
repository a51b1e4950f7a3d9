"""Items of an answer put together to objects; what fits nowhere is kept with its reason."""

import dataclasses
from collections.abc import Iterable
from itertools import groupby

from paligemma_jax.processing.lexing import Item, Kind

CODES = 16  # of one mask
_CORNERS = 4

Rest = tuple[int, int, str]  # first character, end, reason


@dataclasses.dataclass
class Draft:
    """An object while it is read: four locations, 16 codes or none, a label or none."""

    locations: list[Item]
    codes: list[Item] = dataclasses.field(default_factory=list)
    label: Item | None = None
    rest: list[Rest] = dataclasses.field(default_factory=list)

    @property
    def span(self) -> tuple[int, int]:
        """Characters from the first location to the end of the last part that is used."""
        label = [] if self.label is None else [self.label]
        parts = [*self.locations, *self.codes, *label]
        return parts[0].start, max(part.end for part in parts)

    def take(self, kind: Kind, items: list[Item]) -> None:
        """Adds a run of codes, or words."""
        if kind is Kind.WORDS and self.label is None:
            self.label = items[0]
        elif kind is Kind.CODE and not self.codes and len(items) >= CODES:
            self.codes = items[:CODES]
            if len(items) > CODES:
                self.rest.append(_rest(items[CODES:], "mask codes beyond the first 16"))
        elif kind is Kind.CODE:
            reason = "a second mask" if self.codes else "fewer than 16 mask codes"
            self.rest.append(_rest(items, reason))
        else:
            self.rest.append(_rest(items, "words outside of any object"))

    @property
    def fault(self) -> str | None:
        """Why this is no object; None if it is one."""
        if len(self.locations) < _CORNERS:
            return "fewer than four locations"
        y1, x1, y2, x2 = (item.value for item in self.locations)
        return None if y1 <= y2 and x1 <= x2 else "corners out of order"


def assemble(items: Iterable[Item]) -> tuple[list[Draft], list[Rest]]:
    """Objects in their order, and all other characters that are items, in that order."""
    drafts: list[Draft] = []
    unused: list[Rest] = []
    open_draft: Draft | None = None

    def close() -> None:
        if open_draft is None:
            return
        fault = open_draft.fault
        if fault is None:
            drafts.append(open_draft)
            unused.extend(open_draft.rest)
        else:
            start, end = open_draft.span
            end = max([end, *[rest[1] for rest in open_draft.rest]])
            unused.append((start, end, fault))

    for kind, run in groupby(items, key=lambda item: item.kind):
        found = list(run)
        if kind is Kind.LOCATION:
            for first in range(0, len(found), _CORNERS):
                close()
                open_draft = Draft(found[first : first + _CORNERS])
        elif kind is Kind.BREAK:
            close()
            open_draft = None
        elif open_draft is not None:
            open_draft.take(kind, found)
        elif kind is Kind.CODE:
            unused.append(_rest(found, "a mask without a box"))
        else:
            unused.append(_rest(found, "words outside of any object"))
    close()
    return drafts, sorted(unused)


def _rest(items: list[Item], reason: str) -> Rest:
    return items[0].start, items[-1].end, reason
