"""What a run starts from: records, the checkpoint's weights on the devices, and an optimizer."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from paligemma_jax.compiled import keep_compiled_programs
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.abstract import from_params
from paligemma_jax.models.lora import add_lora, is_adapter
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantized_einsum import quantize_stacked
from paligemma_jax.models.skeleton import Skeleton, take_apart
from paligemma_jax.pretrained import load_processor
from paligemma_jax.processing.processor import Processor
from paligemma_jax.resolve import find_checkpoint
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.optimizer import make_optimizer
from paligemma_jax.training.schedules import Run
from paligemma_jax.training.sharding import leaf_sharding, make_mesh, state_shardings
from paligemma_jax.training.state import TrainState, init_state
from paligemma_jax.weights.arrays import as_float_dtype
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.load import with_resolution
from paligemma_jax.weights.on_mesh import load_on_mesh
from paligemma_jax.weights.source import TensorSpec
from paligemma_jax.weights.tree import expected_shapes


@dataclasses.dataclass(frozen=True)
class Start:
    """A run at step 0.

    Attributes:
      config: of the model, with the run's resolution and soft-cap.
      path: of the checkpoint.
      fingerprint: of the checkpoint's files; frozen weights are read from there again.
      stored_dtypes: of the checkpoint's weights, by path.
      skeleton: the model without its arrays, adapters included.
      state: on the devices; `shardings` are those of its arrays.
    """

    config: PaliGemmaConfig
    path: Path
    fingerprint: str
    processor: Processor
    mask_codec: bytes | None
    stored_dtypes: dict[str, np.dtype]
    skeleton: Skeleton
    optimizer: optax.GradientTransformation
    mesh: Mesh
    state: TrainState
    shardings: TrainState


def prepare(config: TrainConfig, total_steps: int, records: int) -> Start:
    """Loads the checkpoint and puts everything on the devices; raises CheckpointError, ConfigError.

    `records` is the number of training records.
    """
    keep_compiled_programs()
    mesh = make_mesh(config.mesh)
    _check_microbatches(config)
    path = find_checkpoint(config.model)
    processor = load_processor(path)
    if config.resolution is not None:
        image = dataclasses.replace(processor.image, size=config.resolution)
        processor = dataclasses.replace(processor, image=image)
    with open_checkpoint(path) as checkpoint:
        stored = {name: spec.dtype for name, spec in checkpoint.specs.items()}
        codec = checkpoint.mask_codec_bytes
    model = load_base(config, mesh)
    if config.quantize is not None:
        model = quantize_stacked(model, config.quantize)
    if config.lora is not None:
        model = add_lora(model, config.lora, nnx.Rngs(config.seed))
    skeleton, arrays = take_apart(model)
    run = Run(total_steps=total_steps, batch_size=config.batch_size, data_size=records)
    optimizer = make_optimizer(config.optimizer, arrays, run)
    trainable = config.optimizer.trainable(arrays)

    def initial(arrays: dict[str, Any]) -> TrainState:
        master = as_float_dtype(config.master_dtype)
        ema = config.step.ema is not None
        return init_state(arrays, trainable, optimizer, dtype=master, ema=ema)

    shapes = jax.eval_shape(initial, arrays)
    shardings = state_shardings(shapes, mesh)
    placed = {
        name: _put(array, shardings.trainable.get(name) or shardings.frozen[name])
        for name, array in arrays.items()
    }
    moving = {name: placed[name] for name in trainable}

    def begin(moving: dict[str, Any]) -> tuple[Any, ...]:
        made = initial(moving)
        return made.step, made.trainable, made.opt_state, made.ema

    lie = (shardings.step, shardings.trainable, shardings.opt_state, shardings.ema)
    step, master, opt_state, ema = jax.jit(begin, out_shardings=lie)(moving)
    frozen = {name: placed[name] for name in shapes.frozen}
    state = TrainState(step, master, frozen, opt_state, ema)
    return Start(
        config=model.config,
        path=path,
        fingerprint=_fingerprint(path),
        processor=processor,
        mask_codec=codec,
        stored_dtypes=stored,
        skeleton=skeleton,
        optimizer=optimizer,
        mesh=mesh,
        state=state,
        shardings=shardings,
    )


def load_base(config: TrainConfig, mesh: Mesh) -> PaliGemma:
    """The checkpoint's model with stacked layers, split over the mesh as it is read.

    Weights to be trained are in `master_dtype`, the others in `dtype`.
    """
    path = find_checkpoint(config.model)
    with open_checkpoint(path) as checkpoint:
        wanted = with_resolution(checkpoint.config, config.resolution)
        if config.final_logit_softcap is not None:
            cap = dataclasses.replace(wanted.llm, final_logit_softcap=config.final_logit_softcap)
            wanted = dataclasses.replace(wanted, llm=cap)
        names = expected_shapes(wanted)
        plain = config.lora is None
        trained = set(config.optimizer.trainable(names)) if plain else set()

        def how(name: str, spec: TensorSpec) -> tuple[np.dtype, NamedSharding]:
            dtype = as_float_dtype(config.master_dtype if name in trained else config.dtype)
            found = dataclasses.replace(spec, dtype=dtype)
            return dtype, leaf_sharding(name, found, mesh)

        params = load_on_mesh(checkpoint, wanted, how)
    return from_params(wanted, params, as_float_dtype(config.dtype).name)


def _put(array: Any, sharding: Any) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(array)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _check_microbatches(config: TrainConfig) -> None:
    parts = config.step.microbatches
    if config.batch_size % parts:
        raise ConfigError(
            f"A batch of {config.batch_size} rows does not go into {parts} microbatches. A number "
            f"that divides it fits. Say for example: --config.step.microbatches=1"
        )


def _fingerprint(path: Path) -> str:
    """Changes when the checkpoint is another one: names and sizes of files, and the manifest."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        if file.name == "MANIFEST.json":
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def is_trained(config: TrainConfig, prefix: str, names: Any) -> bool:
    """Whether any weight under `prefix` is trained itself, adapters left aside."""
    chosen = config.optimizer.schedules.cover(names, "schedules")
    return any(
        schedule is not None and name.startswith(prefix) and not is_adapter(name)
        for name, schedule in chosen.items()
    )
