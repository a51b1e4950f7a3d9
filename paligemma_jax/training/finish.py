"""The result of a run: a model that `from_pretrained` reads, and adapters alone."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from paligemma_jax.models.lora import merge_lora
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.skeleton import take_apart
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.processes import barrier
from paligemma_jax.training.start import Start, load_base
from paligemma_jax.training.state import TrainState
from paligemma_jax.weights.arrays import as_float_dtype
from paligemma_jax.weights.changed_weights import Cast
from paligemma_jax.weights.contents import Contents
from paligemma_jax.weights.export import export_weights
from paligemma_jax.weights.model_weights import model_weights
from paligemma_jax.weights.source import largest_first

MODEL, ADAPTER = "model", "adapter"


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
    base = load_base(config, start.mesh)
    from paligemma_jax.models.lora import add_lora

    skeleton, floats = take_apart(add_lora(base, config.lora, nnx.Rngs(0)))
    learned = {name: arrays[name] for name in floats if "/lora_" in name}
    return merge_lora(skeleton.fill({**floats, **learned}))


def write_model(target: Path, config: TrainConfig, start: Start, state: TrainState) -> None:
    """Writes `target` as a store, in the checkpoint's dtypes unless `save_dtype` says otherwise.

    One that is there already is kept under another name. In a run of several processes each of
    them calls this. Raises CheckpointError.
    """
    weights = model_weights(trained_model(config, start, state))
    dtypes = dict(start.stored_dtypes)
    if config.save_dtype is not None:
        dtypes = dict.fromkeys(weights.specs, as_float_dtype(config.save_dtype))
    weights = Cast(weights, dtypes)
    if jax.process_index() == 0:
        _make_room(target)
        contents = Contents(
            start.processor.to_dict(),
            start.processor.tokenizer.to_bytes(),
            start.mask_codec,
            {"kind": "fine-tuned", "base": start.path.name, "step": int(state.step)},
        )
        export_weights(target, weights, contents)
    else:
        for name in largest_first(weights.specs):  # every process takes part in gathering
            for _ in weights.pieces(name, dtypes[name]):
                pass
    barrier("model written")


def write_adapter(target: Path, config: TrainConfig, start: Start, state: TrainState) -> bool:
    """Writes the adapters alone as PEFT has them; whether there were any to write."""
    if config.lora is None or jax.process_count() > 1:
        return False
    from paligemma_jax.weights.peft import save_adapter

    _make_room(target)
    save_adapter(start.skeleton.fill({**state.params, **(state.ema or {})}), target)
    return True


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
        from paligemma_jax.errors import CheckpointError
        from paligemma_jax.pretrained import from_pretrained

        if self.model is None:
            raise CheckpointError(
                f"The run in {self.workdir} was stopped at step {self.step}, and has no model yet. "
                "A finished run fits. Make the same call again to go on."
            )
        return from_pretrained(self.model, **options)
