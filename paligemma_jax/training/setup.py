"""What a run starts from, weights on the devices, and what it leaves: a model and adapters."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.data.batches import Batches, make_batches
from paligemma_jax.data.record import RecordSource, Transform
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.loading import from_pretrained
from paligemma_jax.models.lora import add_lora, is_adapter, merge_lora
from paligemma_jax.models.paligemma import GraphDef, PaliGemma, from_params, split_model
from paligemma_jax.models.quantization import quantize_stacked
from paligemma_jax.models.sharding import leaf_sharding
from paligemma_jax.processing.processor import Processor
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.distributed import (
    agree,
    barrier,
    is_first,
    place,
    process_shard,
    state_shardings,
)
from paligemma_jax.training.optimizer import RunLength, make_optimizer
from paligemma_jax.training.step import TrainState, init_state
from paligemma_jax.weights.checkpoint import Checkpoint
from paligemma_jax.weights.convert import export_from_all
from paligemma_jax.weights.formats import CheckpointMetadata
from paligemma_jax.weights.load import load_stacked
from paligemma_jax.weights.peft import save_adapter
from paligemma_jax.weights.tensors import TensorSpec, as_float_dtype, expected_shapes
from paligemma_jax.weights.views import cast, model_weights, to_host, with_resolution

MODEL, ADAPTER = "model", "adapter"
_FINISHED = "finished.json"
_KEPT_ORIGIN = ("generation_config", "sliding_window")  # of the base, for answers and for exports
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run at step 0.

    Attributes:
      checkpoint: what the run starts from; frozen weights are read from there again.
      model_config: of the model, with the run's resolution and soft-cap.
      graphdef: the model without its arrays, adapters included.
      state: on the devices of `mesh`; `shardings` are those of its arrays.
      mask_codec: the file of the checkpoint's codec; it may be gone when the run ends.
    """

    checkpoint: Checkpoint
    processor: Processor
    model_config: PaliGemmaConfig
    graphdef: GraphDef
    optimizer: optax.GradientTransformation
    mesh: Mesh
    state: TrainState
    shardings: TrainState
    mask_codec: bytes | None


def set_up(
    config: TrainConfig, checkpoint: Checkpoint, processor: Processor, mesh: Mesh, run: RunLength
) -> Setup:
    """Loads the weights and puts everything on the devices; raises CheckpointError, ConfigError."""
    model = load_base(config, checkpoint, mesh)
    if config.quantize is not None:
        model = quantize_stacked(model, config.quantize)
    if config.lora is not None:
        model = add_lora(model, config.lora, nnx.Rngs(config.seed))
    graphdef, arrays = split_model(model)
    optimizer = make_optimizer(config.optimizer_config, arrays, run)
    trainable = config.optimizer_config.trainable(arrays)

    def initial(arrays: Mapping[str, Any]) -> TrainState:
        master = as_float_dtype(config.master_dtype)
        return init_state(arrays, trainable, optimizer, dtype=master, ema=config.ema is not None)

    shardings = state_shardings(jax.eval_shape(initial, arrays), mesh)
    places = shardings.trainable | shardings.frozen
    placed = {name: place(array, places[name]) for name, array in arrays.items()}
    moving = {name: placed.pop(name) for name in trainable}
    out = dataclasses.replace(shardings, frozen={})
    state = jax.jit(initial, out_shardings=out)(moving)
    state = dataclasses.replace(state, frozen=placed)
    return Setup(
        checkpoint, processor, model.config, graphdef, optimizer, mesh, state, shardings,
        checkpoint.mask_codec_bytes,
    )  # fmt: skip


def load_base(config: TrainConfig, checkpoint: Checkpoint, mesh: Mesh) -> PaliGemma:
    """The checkpoint's model with stacked layers, split over the mesh as it is read.

    Weights to be trained are in `master_dtype`, the others in `dtype`.
    """
    wanted = with_resolution(checkpoint.config, config.resolution)
    if config.final_logit_softcap is not None:
        llm = dataclasses.replace(wanted.llm, final_logit_softcap=config.final_logit_softcap)
        wanted = dataclasses.replace(wanted, llm=llm)
    trained: tuple[str, ...] = ()
    if config.lora is None:
        trained = config.optimizer_config.trainable(expected_shapes(wanted))

    def place_as(name: str, spec: TensorSpec) -> tuple[np.dtype, NamedSharding]:
        dtype = as_float_dtype(config.master_dtype if name in trained else config.dtype)
        return dtype, leaf_sharding(name, dataclasses.replace(spec, dtype=dtype), mesh)

    _, params = load_stacked(checkpoint, resolution=config.resolution, placement=place_as)
    return from_params(wanted, params, as_float_dtype(config.dtype).name)


def open_batches(
    config: TrainConfig,
    source: RecordSource,
    processor: Processor,
    mesh: Mesh,
    *,
    transforms: Sequence[Transform],
    shuffle: bool = True,
    workers: int = 0,
) -> Batches:
    """This process's part of every batch of a run; see `make_batches` and `process_shard`."""
    part, parts = process_shard(mesh, config.batch_size)
    return make_batches(
        source,
        processor,
        batch_size=config.batch_size // parts,
        length=config.text_length,
        seed=config.seed,
        transforms=transforms,
        shuffle=shuffle,
        workers=workers,
        process_index=part,
        process_count=parts,
        on_overflow=config.on_overflow,
        max_bad_fraction=config.max_bad_fraction,
    )


def fingerprint(path: Path) -> str:
    """Changes when the checkpoint is another one: names and sizes of files, and the manifest."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    checksum = hashlib.sha256()
    for file in files:
        checksum.update(f"{file.name} {file.stat().st_size}\n".encode())
        if file.name == "MANIFEST.json":
            checksum.update(file.read_bytes())
    return checksum.hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class FineTuneResult:
    """What a run has come to.

    Attributes:
      workdir: with metrics.jsonl, report.html and checkpoints/.
      step: updates made.
      finished: whether those were all; if not, the same call continues.
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
        """The trained model as a Pipeline: `from_pretrained(self.model, ...)`."""
        if self.model is None:
            raise CheckpointError(
                f"The run in {self.workdir} was stopped at step {self.step}, and has no model yet. "
                "Make the same call again to continue."
            )
        return from_pretrained(self.model, **options)


def has_result(workdir: Path, step: int) -> bool:
    """Whether the model after `step` has been exported, as the first process sees it."""
    found = False
    with contextlib.suppress(OSError, ValueError, KeyError):
        finished = json.loads((workdir / _FINISHED).read_bytes())
        found = finished["step"] == step and (workdir / MODEL).is_dir()
    return bool(agree("the result", "there" if found else ""))


def export(workdir: Path, config: TrainConfig, setup: Setup, state: TrainState, step: int) -> None:
    """Writes the model, the adapters where there are any, and finished.json.

    The model is a native checkpoint, in the base's dtypes unless `save_dtype` says otherwise. What
    is there already is kept under another name. Of several processes each calls this, and the
    first one writes. Raises CheckpointError.
    """
    weights = model_weights(trained_model(config, setup, state))
    dtypes = {name: spec.dtype for name, spec in setup.checkpoint.specs.items()}
    if config.save_dtype is not None:
        dtypes = dict.fromkeys(weights.specs, as_float_dtype(config.save_dtype))
    origin = setup.checkpoint.origin
    kept = {name: origin[name] for name in _KEPT_ORIGIN if name in origin}
    metadata = CheckpointMetadata(
        setup.processor.to_dict(),
        setup.processor.tokenizer.to_bytes(),
        setup.mask_codec,
        kept | {"kind": "fine-tuned", "base": setup.checkpoint.path.name, "step": int(state.step)},
    )
    if is_first():
        _move_aside(workdir / MODEL)
    export_from_all(workdir / MODEL, cast(weights, dtypes), metadata)
    barrier("the model that is written")
    if config.lora is not None:
        _write_adapter(workdir / ADAPTER, setup, state)
    if is_first():
        text = json.dumps({"step": step, "settings": config.settings()}, indent=1)
        (workdir / _FINISHED).write_text(text + "\n")


def trained_model(config: TrainConfig, setup: Setup, state: TrainState) -> PaliGemma:
    """The model as trained, of averaged weights where there is an EMA, adapters merged.

    Adapters of a quantized base are merged into the weights as they were before quantization.
    """
    arrays = state.averaged_params
    if config.lora is None:
        return setup.graphdef.merge_flat(arrays)
    if config.quantize is None:
        return merge_lora(setup.graphdef.merge_flat(arrays))
    base = load_base(config, setup.checkpoint, setup.mesh)
    graphdef, floats = split_model(add_lora(base, config.lora, nnx.Rngs(0)))
    learned = {n: arrays[n] for n in floats if n in state.trainable or is_adapter(n)}
    return merge_lora(graphdef.merge_flat({**floats, **learned}))


def _write_adapter(target: Path, setup: Setup, state: TrainState) -> None:
    """Writes the adapters in PEFT's format, with what else was trained.

    Where that format cannot hold all that was trained, nothing is written, and why is logged.
    """
    arrays = state.averaged_params
    whole = [name for name in state.trainable if not is_adapter(name)]
    # Adapters, and layers with whole weights ("img" and "llm" are none), leave the devices.
    layers = {name.rpartition("/")[0] for name in whole} - {"img", "llm"}
    for name, array in arrays.items():
        if is_adapter(name) or name in whole or name.rpartition("/")[0] in layers:
            arrays[name] = to_host(array)
    problem = ""
    if is_first():
        _move_aside(target)
        try:
            save_adapter(setup.graphdef.merge_flat(arrays), target, whole=whole)
        except ConfigError as e:
            problem = str(e)
            _log.warning("The model is written, adapters alone are not: %s", e)
    agree("the adapters that are written", problem)


def _move_aside(target: Path) -> None:
    number = 1
    while os.path.lexists(aside := target.with_name(f"{target.name}_before_{number}")):
        number += 1
    if os.path.lexists(target):
        os.rename(target, aside)
