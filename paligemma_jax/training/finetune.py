"""Fine-tuning in one call."""

import contextlib
import dataclasses
import difflib
import os
import sys
from typing import Any

from paligemma_jax.errors import ConfigError
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.finish import FineTuned
from paligemma_jax.training.loop import train
from paligemma_jax.training.progress_bar import progress_bar


def finetune(
    model: str | os.PathLike[str],
    records: Any,
    workdir: str | os.PathLike[str],
    *,
    validation: Any = None,
    progress: bool | None = None,
    changed: bool = False,
    **settings: Any,
) -> FineTuned:
    """Fine-tunes a checkpoint; the same call goes on with a run that was stopped or killed.

        result = pg.finetune("demo", records, "runs/digits", duration=Steps(200), lora=LoRA(rank=8))
        print(result.load().ocr("digits.png"))

    Args:
      model: what `from_pretrained` takes.
      records: a path, a source of `paligemma_jax.data`, a list of dicts with "image", "prefix"
        and "suffix", or a `Mixture` of such by weights.
      workdir: where everything is written: checkpoints, metrics, a report, and the model.
      validation: records to measure on during training.
      progress: whether to show a bar; None shows it on terminals and in notebooks.
      changed: go on although settings have changed that decide what is learned.
      settings: fields of `TrainConfig`.

    Raises ConfigError, naming the nearest field, and as `paligemma_jax.training.loop.train`.
    """
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"finetune has no setting {name!r}.{hint} Fields of TrainConfig fit: "
                f"{', '.join(names)}"
            )
    config = TrainConfig(model=os.fspath(model), train=records, validation=validation, **settings)
    wanted = sys.stderr.isatty() or "ipykernel" in sys.modules if progress is None else progress
    with progress_bar() if wanted else contextlib.nullcontext() as update:
        return train(config, workdir, progress=update, changed=changed)
