"""The memory that a run would take, before anything is loaded."""

import logging

import jax
from flax import nnx

from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.models.lora import add_lora
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantized_einsum import quantize_stacked
from paligemma_jax.resolve import find_checkpoint, published_name
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.planner import BatchShape, MemoryPlan, plan_memory, what_fits
from paligemma_jax.training.sharding import Axes, make_mesh
from paligemma_jax.weights.arrays import as_float_dtype
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.load import with_resolution

_log = logging.getLogger(__name__)


def plan(config: TrainConfig, memory: int | None = None) -> str:
    """A table of bytes a device; with `memory` (bytes), what else would fit into so much.

    Of a published model the files need not be there. Raises CheckpointError and ConfigError.
    """
    found, device_count, ways = _plan(config, memory)
    lines = [
        f"{config.model}, {config.batch_size} rows on {device_count} devices, each:",
        str(found),
    ]
    return "\n".join([*lines, *ways])


def plan_in_brief(config: TrainConfig, memory: int | None = None) -> str:
    """The same in two lines, and more only where it does not fit; nothing where it cannot be told.

    For the beginning of a run, which goes on whatever this says.
    """
    try:
        found, device_count, ways = _plan(config, memory)
    except Exception as e:  # whatever it is, a run does not end for want of advice
        _log.debug("The memory could not be planned: %s", e)
        return ""
    kept = found.trainable + found.frozen + found.optimizer + found.average
    words = [
        f"memory: {found.total / 1e9:.2f} GB a device ({device_count}), by the plan",
        f"  weights and optimizer {kept / 1e9:.2f}, gradients {found.gradients / 1e9:.2f}, "
        f"kept for the backward pass {found.kept / 1e9:.2f}",
    ]
    return "\n".join([*words, *ways])


def _plan(config: TrainConfig, memory: int | None) -> tuple[MemoryPlan, int, list[str]]:
    """The plan, the number of devices, and lines about what would fit if it does not."""
    architecture = with_resolution(_architecture(config.model), config.resolution)
    model = nnx.eval_shape(lambda: _model(config, architecture))
    mesh = make_mesh(config.mesh)
    axes = Axes(**{name: mesh.shape[name] for name in ("data", "fsdp", "tensor")})
    shape = BatchShape(rows=config.batch_size, text=config.text_length)
    master = as_float_dtype(config.master_dtype)
    arguments = (model, config.optimizer, config.step_config, shape)
    found: MemoryPlan = plan_memory(*arguments, axes=axes, dtype=master)
    lines: list[str] = []
    if memory is not None and found.total > memory:
        ways = what_fits(memory, *arguments, axes=axes, dtype=master)
        lines.append(f"That is more than {memory / 1e9:.1f} GB. What fits:")
        lines += [
            f"  --config.step.remat='{step.remat}' --config.step.microbatches="
            f"{step.microbatches}: {one.total / 1e9:.1f} GB"
            for step, one in ways
        ] or ["  nothing with this batch: train adapters (configs/lora_24gb.py, configs/qlora.py)"]
    return found, mesh.size, lines


def device_memory() -> int | None:
    """Bytes of one device; None where it does not say, as CPUs."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _architecture(name: str) -> PaliGemmaConfig:
    try:
        path = find_checkpoint(name, download=False)
    except CheckpointError:
        published = published_name(name)
        if published is None:
            raise
        return VARIANTS[published]
    with open_checkpoint(path) as checkpoint:
        return checkpoint.config


def _model(config: TrainConfig, architecture: PaliGemmaConfig) -> PaliGemma:
    dtype = as_float_dtype(config.dtype)
    model = PaliGemma(architecture, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    if config.quantize is not None:
        model = quantize_stacked(model, config.quantize)
    return model if config.lora is None else add_lora(model, config.lora, nnx.Rngs(0))
