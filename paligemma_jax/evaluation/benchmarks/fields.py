"""From the fields of a line to a prompt and to the right answer."""

from collections.abc import Callable, Mapping
from typing import Any

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.evaluation.benchmarks.benchmark import Row
from paligemma_jax.evaluation.metrics.by_group import Grouped
from paligemma_jax.evaluation.metrics.misfit import Misfit, check_text, check_texts
from paligemma_jax.evaluation.metrics.options import Choice
from paligemma_jax.evaluation.metrics.paired import OfPair
from paligemma_jax.processing import prompts

Prompt = Callable[[Row], str]
Reference = Callable[[Row], Any]


def template(text: str) -> Prompt:
    """`{name}` stands for the text of that field, such as "answer en {question}"."""

    def prompt(row: Row) -> str:
        try:
            return text.format_map(_Texts(row))
        except (ValueError, IndexError, AttributeError) as e:
            raise Misfit(f"the prompt {text!r} is no template: {e}") from e

    return prompt


def field(name: str) -> Reference:
    """What the field holds; the metric checks it."""
    return lambda row: _get(row, name)


def grouped(name: str, reference: Reference) -> Reference:
    """Of the group that the field `name` says."""
    return lambda row: Grouped(check_text(_get(row, name), name), reference(row))


def choice(row: Row) -> Choice:
    """Of the fields choices and answer."""
    choices = check_texts(_get(row, "choices"), "choice")
    return Choice(tuple(choices), check_text(_get(row, "answer"), "answer"))


def choice_prompt(row: Row) -> str:
    """big_vision's prompt with choices, of A-OKVQA and AI2D; both spaces and the tabs are its."""
    choices = check_texts(_get(row, "choices"), "choice")
    question = check_text(_get(row, "question"), "question")
    return f"answer en  {question} choose from: " + " \t ".join(choices)


def science_prompt(row: Row) -> str:
    """big_vision's prompt of ScienceQA; "N/A" where there is no hint."""
    choices = check_texts(_get(row, "choices"), "choice")
    options = ", ".join(f"({chr(65 + i)}) {text}" for i, text in enumerate(choices))
    question = check_text(_get(row, "question"), "question")
    hint = check_text(row.get("hint") or "N/A", "hint")
    return f"Question: {question}\nContext: {hint}\nOptions: {options}\nAnswer:"


def detect_prompt(row: Row) -> str:
    """Of the field labels: a list, or "cat ; dog"."""
    try:
        return prompts.detect(_get(row, "labels"))
    except (InvalidPromptError, TypeError) as e:
        raise Misfit(f"the labels do not fit: {e}") from e


def of_pair(row: Row) -> OfPair:
    """Of the fields pair and answer."""
    pair = _get(row, "pair")
    if not isinstance(pair, str | int):
        raise Misfit(f"the pair is {pair!r} of type {type(pair).__name__}, no name or number")
    return OfPair(pair, check_text(_get(row, "answer"), "answer"))


def _get(row: Row, name: str) -> Any:
    if name not in row:
        raise Misfit(f"the field {name!r} is missing; there are {', '.join(map(repr, row))}")
    return row[name]


class _Texts(dict[str, str]):
    """The fields of a line as texts, for a template."""

    def __init__(self, row: Mapping[str, Any]):
        super().__init__()
        self._row = row

    def __missing__(self, name: str) -> str:
        return check_text(_get(self._row, name), name)
