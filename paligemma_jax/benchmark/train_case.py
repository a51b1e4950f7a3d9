"""What is measured of training: some steps on one batch, and the losses that they give."""

import dataclasses
from typing import Any, Protocol

from paligemma_jax.benchmark.task import Task
from paligemma_jax.benchmark.timing import Effort, Sample, sample
from paligemma_jax.benchmark.train_inputs import TrainInputs, random_examples
from paligemma_jax.config import PaliGemmaConfig

_LOSS = "loss "  # and the step's number: a loss among a record's numbers


class Trainer(Protocol):
    """One way to train one model, on one batch.

    Masters and moments are float32. The optimizer is AdamW without decay, at a constant rate, of
    gradients that are clipped to a norm of 1.
    """

    def step(self) -> float:
        """One update, to the end of its work; returns the loss before it."""
        ...

    def forget_peak(self) -> None:
        """Begins to measure `peak_bytes` anew, where that is possible."""
        ...

    def peak_bytes(self) -> int:
        """Most memory held: of the device, on CPUs of the process."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainSteps:
    """Steps of one batch.

    Attributes:
      task: what is trained.
      batch: rows, of one picture each.
      text: tokens that the model reads after a picture.
      suffix: tokens of them to learn.
      compared: first steps whose losses are compared.
      effort: steps that are timed, after the first one.
    """

    task: Task
    batch: int
    text: int = 64
    suffix: int = 32
    compared: int = 3
    effort: Effort = Effort(3, 12, 10.0)

    @property
    def name(self) -> str:
        """The same for all implementations."""
        kind = "LoRA" if self.task is Task.LORA else "full"
        return f"{kind} training, batch {self.batch}"

    @property
    def learning_rate(self) -> float:
        """As the configurations of this library have it."""
        return 2e-4 if self.task is Task.LORA else 1e-5

    def inputs(self, config: PaliGemmaConfig) -> TrainInputs:
        """The batch."""
        return random_examples(config, self.batch, self.text, self.suffix)

    def operations(self, config: PaliGemmaConfig) -> float:
        """Of one step, as `paligemma train` counts them for its MFU (see `training.speed`).

        Each product once forward, once for the gradient in what it takes and once for that in its
        weights, where these are trained; nothing twice for being computed again.
        """
        from paligemma_jax.training.speed import work_of

        whole = self.task is Task.FULL
        work = work_of(config, self.text, image_trained=whole, text_trained=whole)
        return self.batch * work.operations

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainSteps":
        """Inverse of `to_dict`."""
        changed = {"task": Task(values["task"]), "effort": Effort(**values["effort"])}
        return cls(**{**values, **changed})


@dataclasses.dataclass(frozen=True)
class Trained:
    """Timed steps, and the losses of the first ones."""

    samples: list[Sample]
    losses: list[float]


def train(trainer: Trainer, case: TrainSteps) -> Trained:
    """Steps the trainer, which has made one step already, that gave `losses[0]`."""
    losses: list[float] = []
    samples: list[Sample] = []
    effort = case.effort
    fewest = max(effort.fewest, case.compared - 1)
    while len(samples) < fewest or (
        len(samples) < effort.most and sum(s.seconds for s in samples) < effort.seconds
    ):
        samples.append(sample(lambda: losses.append(trainer.step())))
    return Trained(samples, losses)


def train_rates(numbers: dict[str, float], per_second: float, rate: float) -> dict[str, float]:
    """What follows from a row's samples and operations a second, as further numbers of it."""
    found: dict[str, float] = {}
    if "tokens_a_sample" in numbers:
        found["tokens_a_second"] = per_second * numbers["tokens_a_sample"]
    if "datasheet_rate" in numbers:
        found["share_of_datasheet"] = rate / numbers["datasheet_rate"]
    return found


def loss_numbers(losses: list[float]) -> dict[str, float]:
    """As a record's numbers."""
    return {f"{_LOSS}{step}": loss for step, loss in enumerate(losses, 1)}


def losses_of(numbers: dict[str, float]) -> list[float]:
    """Inverse of `loss_numbers`."""
    found = {name: value for name, value in numbers.items() if name.startswith(_LOSS)}
    return [found[name] for name in sorted(found)]
