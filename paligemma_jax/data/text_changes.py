"""Changes to prompts and answers that leave pictures alone."""

import dataclasses
import re

import numpy as np

from paligemma_jax.data.record import Record
from paligemma_jax.errors import DatasetError, InvalidPromptError
from paligemma_jax.processing.parsing import Box, format_answer, parse_answer
from paligemma_jax.processing.prompts import split_labels

ASK = re.compile(r"(detect|segment) (.+)", re.DOTALL)  # prompts about objects


@dataclasses.dataclass(frozen=True)
class LowerCase:
    """Prompt and answer in small letters, or one of them, as some data sets are learnt."""

    prefix: bool = True
    suffix: bool = True

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if self.prefix:
            record = dataclasses.replace(record, prefix=record.prefix.lower())
        if self.suffix:
            answers = tuple(answer.lower() for answer in record.answers)
            record = dataclasses.replace(record, suffix=record.suffix.lower(), answers=answers)
        return record


@dataclasses.dataclass(frozen=True)
class ShuffleBoxes:
    """The objects of an answer in random order, so that none is learnt.

    With `labels_too` those that the prompt asks for as well. Answers without objects stay.
    """

    labels_too: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        objects = objects_of(record)
        if objects:
            order = rng.permutation(len(objects))
            suffix = format_answer([objects[int(place)] for place in order])
            record = dataclasses.replace(record, suffix=suffix)
        asked = ASK.fullmatch(record.prefix) if self.labels_too else None
        if asked:
            labels = list(split_labels(asked[2]))
            labels = [labels[int(place)] for place in rng.permutation(len(labels))]
            record = dataclasses.replace(record, prefix=f"{asked[1]} {' ; '.join(labels)}")
        return record


@dataclasses.dataclass(frozen=True)
class AskForSome:
    """A prompt that asks for some of the classes: those that are there, and others that are not.

    Attributes:
      classes: all that can be asked for; without, those of the record's own prompt.
      most: how many of those present are asked for, drawn at random; all if None. The boxes of the
        others leave the answer.
      negatives: how many absent ones are asked for, up to this number, drawn anew each time.
        A record without objects is asked for at least one.
    """

    classes: tuple[str, ...] = ()
    most: int | None = None
    negatives: int = 0

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        asked = ASK.fullmatch(record.prefix)
        if not asked:
            return record
        known = list(self.classes or split_labels(asked[2]))
        objects = objects_of(record)
        present = list(dict.fromkeys(thing.label for thing in objects))
        unknown = [label for label in present if label not in known]
        if unknown:
            raise DatasetError(
                f"{record.id} has objects of {', '.join(unknown)}, which is none of the classes. "
                "All classes of the data fit. Add them: AskForSome(classes=(...))"
            )
        count = len(present) if self.most is None else min(self.most, len(present))
        chosen = [present[int(place)] for place in rng.permutation(len(present))[:count]]
        absent = [label for label in known if label not in present]
        wanted = int(rng.integers(self.negatives + 1)) if self.negatives else 0
        wanted = min(len(absent), max(wanted, 0 if chosen else 1))
        others = [absent[int(place)] for place in rng.permutation(len(absent))[:wanted]]
        labels = chosen + others
        labels = [labels[int(place)] for place in rng.permutation(len(labels))]
        kept = [thing for thing in objects if thing.label in chosen]
        return dataclasses.replace(
            record, prefix=f"{asked[1]} {' ; '.join(labels)}", suffix=format_answer(kept)
        )


def objects_of(record: Record) -> tuple[Box, ...]:
    """The objects of an answer; none for one of words alone.

    Raises DatasetError for an answer of which a part would be lost.
    """
    if "<loc" not in record.suffix:
        return ()
    answer = parse_answer(record.suffix)
    if answer.unused:
        piece = answer.unused[0]
        raise DatasetError(
            f"{record.id}: {piece.text!r} in the answer is no object: {piece.reason}. Four "
            "locations and a label each, with ; between, fit. Correct the answer."
        )
    try:
        format_answer(answer.objects)
    except InvalidPromptError as e:
        raise DatasetError(f"{record.id}: {e}") from e
    return answer.objects
