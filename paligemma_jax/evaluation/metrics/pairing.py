"""Which prediction belongs to which reference."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from paligemma_jax.evaluation.metrics.misfit import refuse

Id = str | int
T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")
# Paired by id or by place. A mapping's keys are `Id`; a type checker would refuse dict[str, T] for
# Mapping[str | int, T].
Examples = Mapping[Any, T] | Sequence[T]


def by_id(pairs: Iterable[tuple[Id, T]]) -> dict[Id, T]:
    """The values by id; raises DatasetError naming every id that comes twice."""
    values: dict[Id, T] = {}
    counts: dict[Id, int] = {}
    for id, value in pairs:
        counts[id] = counts.get(id, 0) + 1
        values[id] = value
    problems = [f"{id!r} comes {count} times" for id, count in counts.items() if count > 1]
    if problems:
        raise refuse(problems, "Every id once fits.", "Leave out all but one record of each.")
    return values


def pair(predictions: Examples[P], references: Examples[R]) -> list[tuple[Id, P, R]]:
    """(id, prediction, reference) of every example, in the order of the references.

    Two mappings are paired by id, two sequences of one length by place, which is then the id.
    Raises DatasetError naming every id without partner.
    """
    if isinstance(predictions, Mapping) and isinstance(references, Mapping):
        alone = [id for id in references if id not in predictions]
        problems = [f"{id!r} has a reference, but no prediction" for id in alone]
        alone = [id for id in predictions if id not in references]
        problems += [f"{id!r} has a prediction, but no reference" for id in alone]
        if problems:
            raise refuse(
                problems,
                "The same ids on both sides fit.",
                "Predict what is missing, or score a part: "
                "{id: references[id] for id in predictions}",
            )
        return [(id, predictions[id], reference) for id, reference in references.items()]
    if isinstance(predictions, str | Mapping) or isinstance(references, str | Mapping):
        raise refuse(
            [
                f"predictions are of type {type(predictions).__name__} and references of type "
                f"{type(references).__name__}"
            ],
            "Two lists in one order, or two mappings from ids, fit.",
            "Call for example: exact_match(['a cat'], ['a cat'])",
        )
    if len(predictions) != len(references):
        raise refuse(
            [f"there are {len(predictions)} predictions and {len(references)} references"],
            "Two lists of one length and order fit.",
            "To pair by id, pass two mappings: {id: prediction}, {id: reference}",
        )
    return [(i, p, r) for i, (p, r) in enumerate(zip(predictions, references, strict=True))]


def sort_key(id: Id) -> tuple[bool, Any]:
    """Numbers by size and before strings, so that results do not depend on who came first."""
    return isinstance(id, str), id
