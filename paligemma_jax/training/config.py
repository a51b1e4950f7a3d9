"""Everything that a training run is told, as typed values."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.data import RandomAnswer, SkipBadRecords, StopAtBadRecord
from paligemma_jax.data.record import Transform
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.lora import TRAINABLE, LoRA
from paligemma_jax.models.path_rules import Rules
from paligemma_jax.models.recipe import Recipe
from paligemma_jax.processing.overflow import Overflow, Refuse
from paligemma_jax.training.bad_loss import BadLoss, SkipBadLoss, StopAtBadLoss
from paligemma_jax.training.checkpoints import Best
from paligemma_jax.training.optimizer import KERNELS, Adam, Method, OptimizerConfig
from paligemma_jax.training.schedules import Cosine, Duration, Epochs, Run, Schedule, Share, Steps
from paligemma_jax.training.sharding import Axes
from paligemma_jax.training.step import Skip, StepConfig
from paligemma_jax.weights.arrays import as_float_dtype

ALL = ".*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning run; configs/base.py says what each field is good for.

    Attributes:
      model: what `from_pretrained` takes.
      resolution: pixels a side; the position embeddings are resampled. None: the checkpoint's.
      train: records: a path, `Data`, a source, a list of dicts, a tuple of several of them, or a
        `Mixture` of them by weights.
      validation: records to look at during training; None for none.
      transforms: changes made to training records, in turn; a part of a mixture may have its own.
      validation_transforms: those made to validation records; None: the same ones.
      text_length: tokens of prompt and answer.
      on_overflow: what happens to longer ones.
      bad_records: what happens to records that cannot be used.
      workers: processes that read ahead.
      batch_size: rows of one update, over all devices and processes.
      duration: how long to train.
      seed: of the order of records, their transforms, dropout and new adapters.
      learning_rate, method, schedule, weight_decay, clip_norm: see `OptimizerConfig`.
      trainable: regular expression over parameter paths; the rest is frozen. None: all, or the
        adapters' with `lora`.
      schedules: a schedule by path, in place of `schedule` and `trainable`; None freezes.
      rate_factors: further factors on the learning rate by path.
      decays: factors on the weight decay by path.
      step: how an update is computed: label smoothing, dropout, microbatches, memory.
      lora: adapters to train; None for none.
      quantize: weights of few bits beneath the adapters (QLoRA); None keeps floats.
      final_logit_softcap: 0.0 is off, better for transfers (big_vision); None: the checkpoint's.
      dtype: of activations, and of frozen weights.
      master_dtype: of trained weights and the optimizer's state.
      mesh: how devices share the work.
      bad_loss: `StopAtBadLoss()` or `SkipBadLoss()`.
      log_every, evaluate_every, checkpoint_every: how often.
      keep: checkpoints kept, besides the best one.
      best: which checkpoint is the best, and becomes the result; None takes the last.
      evaluate_batches: of the validation records, at most; None takes all.
      samples: validation records answered and drawn at every evaluation.
      sample_tokens: where such an answer is cut.
      tensorboard: whether to write for it; None: where it is installed.
      wandb: the project at Weights & Biases to report to; None: no report. Needs the extra "wandb".
      save_dtype: of the resulting model's weights; None: the checkpoint's.
    """

    model: str = "demo"
    resolution: int | None = None
    train: Any = None
    validation: Any = None
    transforms: tuple[Transform, ...] = (RandomAnswer(),)
    validation_transforms: tuple[Transform, ...] | None = None
    text_length: int = 128
    on_overflow: Overflow = Refuse()
    bad_records: StopAtBadRecord | SkipBadRecords = StopAtBadRecord()
    workers: int = 0
    batch_size: int = 32
    duration: Duration = Epochs(1)
    seed: int = 0
    learning_rate: float = 1e-5
    method: Method = Adam()
    schedule: Schedule = Cosine(warmup=Share(0.05))
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    trainable: str | None = None
    schedules: Rules[Schedule | None] | None = None
    rate_factors: Rules[float] = Rules(())
    decays: Rules[float] = KERNELS
    step: StepConfig = StepConfig()
    lora: LoRA | None = None
    quantize: Recipe | str | None = None
    final_logit_softcap: float | None = 0.0
    dtype: str = "bfloat16"
    master_dtype: str = "float32"
    mesh: Axes = Axes(fsdp=-1)
    bad_loss: BadLoss = StopAtBadLoss()
    log_every: Duration = Steps(10)
    evaluate_every: Duration = Share(0.1)
    checkpoint_every: Duration = Steps(500)
    keep: int = 2
    best: Best | None = None
    evaluate_batches: int | None = 16
    samples: int = 8
    sample_tokens: int = 128
    tensorboard: bool | None = None
    wandb: str | None = None
    save_dtype: str | None = None

    def __post_init__(self) -> None:
        problems = [*self._bad_numbers(), *self._contradictions()]
        if problems:
            raise ConfigError(
                f"The configuration does not fit: {'; '.join(problems)}. Change it in the file, or "
                "on the command line: --config.NAME=VALUE"
            )
        for name in (self.dtype, self.master_dtype, self.save_dtype or "float32"):
            as_float_dtype(name)

    def _bad_numbers(self) -> list[str]:
        least = {
            "batch_size": 1,
            "text_length": 2,
            "keep": 1,
            "workers": 0,
            "seed": 0,
            "samples": 0,
            "sample_tokens": 1,
        }
        problems = [
            f"{name} is {getattr(self, name)!r}, must be a whole number from {bound} up"
            for name, bound in least.items()
            if not isinstance(getattr(self, name), int) or getattr(self, name) < bound
        ]
        rate, decay = self.learning_rate, self.weight_decay
        if not (isinstance(rate, int | float) and math.isfinite(rate) and rate > 0):
            problems.append(f"learning_rate is {rate!r}, must be positive and finite")
        if not (isinstance(decay, int | float) and math.isfinite(decay) and decay >= 0):
            problems.append(f"weight_decay is {decay!r}, must be 0 or more, and finite")
        if self.clip_norm is not None and not self.clip_norm > 0:
            problems.append(f"clip_norm is {self.clip_norm}, must be positive or None")
        return problems

    def _contradictions(self) -> list[str]:
        problems = []
        if self.schedules is not None and self.trainable is not None:
            problems.append("schedules and trainable are both given, and both say what is trained")
        if self.quantize is not None and self.lora is None:
            problems.append(
                "quantize is given without lora, and rounded weights cannot be trained; add "
                "lora=LoRA()"
            )
        if self.best is not None and self.validation is None:
            problems.append("best is given without validation records to measure on")
        if self.step.skip is not None:
            problems.append("step.skip is given; say it with bad_loss=SkipBadLoss()")
        return problems

    @classmethod
    def from_config(cls, config: ConfigDict) -> "TrainConfig":
        """Raises ConfigError for fields that are unknown or do not fit."""
        values: Mapping[str, Any] = {name: config[name] for name in config}
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(
                f"The configuration has unknown settings: {', '.join(unknown)}. There are: "
                f"{', '.join(known)}. Begin with a copy of configs/base.py"
            )
        return cls(**values)

    def to_config(self) -> ConfigDict:
        """Inverse of `from_config`, to be changed by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ConfigDict(values, type_safe=False).lock()

    @property
    def optimizer(self) -> OptimizerConfig:
        """The part that is the optimizer's."""
        return OptimizerConfig(
            learning_rate=self.learning_rate,
            method=self.method,
            schedules=self._schedules(),
            rate_factors=self.rate_factors,
            weight_decay=self.weight_decay,
            decays=self.decays,
            clip_norm=self.clip_norm,
        )

    @property
    def step_config(self) -> StepConfig:
        """How an update is computed, bad ones included."""
        skip = Skip() if isinstance(self.bad_loss, SkipBadLoss) else None
        return dataclasses.replace(self.step, skip=skip)

    def total_steps(self, records: int) -> int:
        """Updates of the whole run over so many records."""
        run = Run(total_steps=0, batch_size=self.batch_size, data_size=records)
        steps = self.duration.steps(run)
        if steps < 1:
            raise ConfigError(
                f"duration={self.duration!r} is {steps} steps of {self.batch_size} rows. At least "
                "one step fits. Say for example: --config.duration='Steps(1000)'"
            )
        return steps

    def _schedules(self) -> Rules[Schedule | None]:
        if self.schedules is not None:
            return self.schedules
        pattern = self.trainable or (ALL if self.lora is None else TRAINABLE)
        if pattern == ALL:
            return Rules(((ALL, self.schedule),))
        return Rules(((pattern, self.schedule), (ALL, None)))


def describe(config: TrainConfig) -> dict[str, str]:
    """Every setting as text; what decides whether a checkpoint belongs to the same run."""
    return {f.name: _say(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _say(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    text = value.__name__ if hasattr(value, "__name__") else repr(value)
    return text if len(text) < 2000 and " at 0x" not in text else type(value).__name__
