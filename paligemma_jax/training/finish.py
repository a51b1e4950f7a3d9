"""The result of a run: a model that `from_pretrained` reads, and adapters alone."""

import dataclasses
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax import nnx

from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.models.lora import add_lora, is_adapter, merge_lora
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.skeleton import take_apart
from paligemma_jax.pretrained import from_pretrained
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.processes import agree, barrier, is_first
from paligemma_jax.training.start import Start, load_base
from paligemma_jax.training.state import TrainState
from paligemma_jax.weights.array_weights import to_host
from paligemma_jax.weights.arrays import as_float_dtype
from paligemma_jax.weights.changed_weights import Cast
from paligemma_jax.weights.contents import Contents
from paligemma_jax.weights.model_weights import model_weights
from paligemma_jax.weights.peft import save_adapter
from paligemma_jax.weights.shared_export import export_from_all

MODEL, ADAPTER = "model", "adapter"
_log = logging.getLogger(__name__)


def trained_model(config: TrainConfig, start: Start, state: TrainState) -> PaliGemma:
    """The model as trained, of averaged weights where there are any, adapters merged.

    Adapters of a quantized base are merged into the weights as they were before rounding.
    """
    arrays = {**state.params, **(state.ema or {})}
    model = start.skeleton.fill(arrays)
    if config.lora is None:
        return model
    if config.quantize is None:
        return merge_lora(model)
    base = add_lora(load_base(config, start.mesh), config.lora, nnx.Rngs(0))
    skeleton, floats = take_apart(base)
    learned = {n: arrays[n] for n in floats if n in state.trainable or is_adapter(n)}
    return merge_lora(skeleton.fill({**floats, **learned}))


def write_model(target: Path, config: TrainConfig, start: Start, state: TrainState) -> None:
    """Writes `target` as a store, in the checkpoint's dtypes unless `save_dtype` says otherwise.

    One that is there already is kept under another name. Of several processes each calls this, and
    the first one writes. Raises CheckpointError.
    """
    weights = model_weights(trained_model(config, start, state))
    dtypes = dict(start.stored_dtypes)
    if config.save_dtype is not None:
        dtypes = dict.fromkeys(weights.specs, as_float_dtype(config.save_dtype))
    weights = Cast(weights, dtypes)
    contents = Contents(
        start.processor.to_dict(),
        start.processor.tokenizer.to_bytes(),
        start.mask_codec,
        {"kind": "fine-tuned", "base": start.path.name, "step": int(state.step)},
    )
    if is_first():
        _make_room(target)
    export_from_all(target, weights, contents)
    barrier("the model that is written")


def write_adapter(target: Path, config: TrainConfig, start: Start, state: TrainState) -> bool:
    """Writes the adapters as PEFT has them, with what else was trained; whether there is any.

    Nothing is written, and why is logged, where PEFT's format cannot hold all that was trained. Of
    several processes each calls this, and the first one writes.
    """
    if config.lora is None:
        return False
    whole = [name for name in state.trainable if not is_adapter(name)]
    arrays = {**state.params, **(state.ema or {})}
    arrays |= {name: to_host(arrays[name]) for name in _of_modules(arrays, whole)}
    problem = ""
    if is_first():
        _make_room(target)
        try:
            save_adapter(start.skeleton.fill(arrays), target, whole=whole)
        except ConfigError as e:
            problem = str(e)
            _log.warning("The model is written, adapters alone are not: %s", e)
    return not agree("the adapters that are written", problem)


def _of_modules(names: Iterable[str], whole: Iterable[str]) -> list[str]:
    """Of `names` the adapters, and `whole` with all that is in the same layers."""
    layers = {name.rpartition("/")[0] for name in whole} - {"img", "llm"}  # those are no layers
    return [
        name
        for name in names
        if is_adapter(name) or name in whole or name.rpartition("/")[0] in layers
    ]


def _make_room(target: Path) -> None:
    number = 1
    while os.path.lexists(aside := target.with_name(f"{target.name}_before_{number}")):
        number += 1
    if os.path.lexists(target):
        os.rename(target, aside)


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """What a run has come to.

    Attributes:
      workdir: with metrics.jsonl, report.html and checkpoints/.
      step: updates made.
      finished: whether those were all; if not, the same call goes on.
      model: a directory for `from_pretrained`; None before the run has finished.
      adapter: of LoRA, as PEFT reads it; None without.
      metrics: the last value of each.
      stopped_by: the name of the signal that ended it early.
    """

    workdir: Path
    step: int
    finished: bool
    model: Path | None
    adapter: Path | None
    metrics: dict[str, float]
    stopped_by: str | None = None

    def load(self, **options: Any) -> Any:
        """The trained model, ready to be asked: `from_pretrained(self.model, ...)`."""
        if self.model is None:
            raise CheckpointError(
                f"The run in {self.workdir} was stopped at step {self.step}, and has no model yet. "
                "A finished run fits. Make the same call again to go on."
            )
        return from_pretrained(self.model, **options)
