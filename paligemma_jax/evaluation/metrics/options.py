"""Accuracy of an answer that names one of given options."""

import dataclasses
import re
from typing import Any

from paligemma_jax.evaluation.metrics.misfit import Misfit, check_text, check_texts
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import MeanAccumulator

_LETTER = re.compile(r"the answer is ([a-z])\.")


def option_letter(text: str) -> str | None:
    """The letter of an answer that begins "The answer is X.", in lower case; else None."""
    found = _LETTER.match(text.lower())
    return found[1] if found else None


class OptionLetterAccuracy(MeanAccumulator):
    """`acc` and `parsefail`, both in 0..1, of answers such as "The answer is B."

    A prediction is right if `option_letter` reads the right letter from it; `parsefail` is the
    share in which it reads none, which are wrong. A prediction is a string, a reference the letter
    or the whole right answer. Source: Lu et al. 2022, ScienceQA, in big_vision's form (there, a
    reference that cannot be read equals a prediction that cannot; here it does not fit).
    """

    main = "acc"
    fits = 'A prediction (string) and the letter ("b", or "The answer is B.") fit.'

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        found = option_letter(check_text(prediction, "prediction"))
        text = check_text(reference, "answer").strip()
        right = text.lower() if len(text) == 1 and text.isalpha() else option_letter(text)
        if right is None:
            raise Misfit(f"the answer {text[:40]!r} names no letter")
        return {"acc": float(found == right), "parsefail": float(found is None)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The texts to choose from, and which of them is right."""

    choices: tuple[str, ...]
    answer: str


class ChoiceAccuracy(MeanAccumulator):
    """`acc` in 0..1: share of predictions that are the text of the right choice.

    Outer white space does not count; case does, as choices may differ in it alone. `no_choice` is
    the share of predictions that are none of the choices, which are wrong. A prediction is a
    string, a reference a `Choice`. For A-OKVQA (Schwenk et al. 2022) and AI2D (Kembhavi et al.
    2016), prompted with the choices.
    """

    main = "acc"
    fits = "A prediction (string) and a Choice(choices, answer) with its answer among them fit."

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction").strip()
        if not isinstance(reference, Choice):
            raise Misfit(f"the reference is of type {type(reference).__name__}, not Choice")
        choices = [c.strip() for c in check_texts(reference.choices, "choice")]
        answer = check_text(reference.answer, "answer").strip()
        if answer not in choices:
            raise Misfit(f"the answer {answer!r} is none of the choices {choices}")
        return {"acc": float(text == answer), "no_choice": float(text not in choices)}


def option_letter_accuracy(
    predictions: Examples[str], references: Examples[str]
) -> dict[str, float]:
    """`OptionLetterAccuracy` of lists or mappings; raises DatasetError."""
    return OptionLetterAccuracy().add_all(predictions, references).result()


def choice_accuracy(
    predictions: Examples[str],
    references: Examples[Choice],
) -> dict[str, float]:
    """`ChoiceAccuracy` of lists or mappings; raises DatasetError."""
    return ChoiceAccuracy().add_all(predictions, references).result()
