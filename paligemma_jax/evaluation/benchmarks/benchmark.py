"""What a benchmark is: how data is written, what is asked, how answers are judged."""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any

from paligemma_jax.evaluation.metrics.tasks import TASKS, Measured

Row = Mapping[str, Any]  # one line of a data file


class Answer(enum.Enum):
    """What is made of the model's words before they are judged."""

    TEXT = "text"
    MASK = "mask"
    BOXES = "boxes"
    MASKS = "masks"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One published task.

    Attributes:
      name: as `paligemma eval --task` has it; `title` for people.
      source: the paper of the data.
      example: one line of the data file, with every field that is read.
      prompt: of a line.
      reference: the right answer of a line, as the metric takes it; raises Misfit.
      task: of `metrics.tasks.TASKS`; the name where it is not given.
      measure: instead of a task's.
      answer: what the words are read as.
      max_new_tokens, beams: how answers are made; one beam is greedy.
      published: the figure `measured.main` of published models, by name such as
        "paligemma-3b-448", in the unit of the tables.
      scale: what the figure is multiplied with in tables.
      card: what figures by name are on the model's own card, in the unit of the tables.
      group: the field that names the kind of a line, where figures are by kind.
      notes: what to know before numbers are compared.
    """

    name: str
    title: str
    source: str
    example: Row
    prompt: Callable[[Row], str]
    reference: Callable[[Row], Any]
    task: str = ""
    measure: Measured | None = None
    answer: Answer = Answer.TEXT
    max_new_tokens: int = 32
    beams: int = 1
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    card: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scale: float = 100.0
    group: str | None = None
    notes: str = ""

    @property
    def measured(self) -> Measured:
        """Its metric and the figure that is published."""
        return self.measure or TASKS[self.task or self.name]
