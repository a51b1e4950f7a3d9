"""What of an example does not fit a metric, said for all examples at once."""

import numbers
from collections.abc import Mapping, Sequence, Set
from typing import Any

from paligemma_jax.errors import DatasetError

_SHOWN = 100  # problems in a message; the rest are counted


class Misfit(Exception):
    """One example does not fit; the text says why, without its id and without advice."""


def refuse(problems: Sequence[str], fits: str, mend: str) -> DatasetError:
    """The error that lists `problems`; `fits` and `mend` are its last two sentences."""
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return DatasetError(f"The data does not fit ({count}):{shown}{more}\n{fits} {mend}")


def check_text(value: Any, what: str) -> str:
    """`value` itself; raises Misfit unless it is a string."""
    if value is None:
        raise Misfit(f"the {what} is missing")
    if not isinstance(value, str):
        raise Misfit(f"the {what} is {_show(value)} of type {type(value).__name__}, no string")
    return value


def check_texts(values: Any, what: str, count: int | None = None) -> list[str]:
    """`values` as a list; raises Misfit unless it holds strings: `count` of them, or at least one.

    A single string is no list: its letters would be taken for answers.
    """
    if values is None:
        raise Misfit(f"the {what}s are missing")
    if isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__iter__"):
        raise Misfit(f"the {what}s are {_show(values)} of type {type(values).__name__}, no list")
    values = list(values)
    if not values:
        raise Misfit(f"there are no {what}s")
    if count is not None and len(values) != count:
        raise Misfit(f"there are {len(values)} {what}s, not {count}")
    wrong = [value for value in values if not isinstance(value, str)]
    if wrong:
        kinds = ", ".join(sorted({type(value).__name__ for value in wrong}))
        raise Misfit(f"{len(wrong)} of the {what}s are no strings but {kinds}: {_show(wrong[0])}")
    return values


def check_number(value: Any, what: str, low: float = float("-inf")) -> float:
    """`value` as a float; raises Misfit unless it is a finite number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Misfit(f"the {what} is {_show(value)} of type {type(value).__name__}, no number")
    number = float(value)
    if not low <= number < float("inf"):
        raise Misfit(f"the {what} is {number}, no number" + (f" from {low:g} up" * (low > -1e308)))
    return number


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
