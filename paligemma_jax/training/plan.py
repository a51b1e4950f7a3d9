"""The memory that a run would take, before anything is loaded."""

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


def plan(config: TrainConfig, memory: int | None = None) -> str:
    """A table of bytes a device; with `memory` (bytes), what else would fit into so much.

    Of a published model the files need not be there. Raises CheckpointError and ConfigError.
    """
    architecture = with_resolution(_architecture(config.model), config.resolution)
    model = nnx.eval_shape(lambda: _model(config, architecture))
    mesh = make_mesh(config.mesh)
    axes = Axes(**{name: mesh.shape[name] for name in ("data", "fsdp", "tensor")})
    shape = BatchShape(rows=config.batch_size, text=config.text_length)
    master = as_float_dtype(config.master_dtype)
    arguments = (model, config.optimizer, config.step_config, shape)
    found: MemoryPlan = plan_memory(*arguments, axes=axes, dtype=master)
    lines = [f"{config.model}, {shape.rows} rows on {mesh.size} devices, each:", str(found)]
    if memory is not None and found.total > memory:
        ways = what_fits(memory, *arguments, axes=axes, dtype=master)
        lines.append(f"That is more than {memory / 1e9:.1f} GB. What fits:")
        lines += [
            f"  --config.step.remat='{step.remat}' --config.step.microbatches="
            f"{step.microbatches}: {one.total / 1e9:.1f} GB"
            for step, one in ways
        ] or ["  nothing with this batch: train adapters (configs/lora_24gb.py, configs/qlora.py)"]
    return "\n".join(lines)


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
