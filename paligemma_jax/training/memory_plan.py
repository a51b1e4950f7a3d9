"""How much memory a training step takes on each device, estimated before anything is allocated.

The model is traced with shapes alone, once as it is to be trained and once keeping everything: what
a gradient keeps is then known exactly, and the work inside a layer is near to what one would keep.
The rest is arithmetic. On a CPU the total is within a tenth of what XLA reserves (full training of
PaliGemma 3B in float32: 51.61 GB estimated, 51.61 GB reserved); on several devices activations are
not divided over the axis "tensor".
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Var

from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.loading import find_checkpoint, published_name
from paligemma_jax.models.layers import DType
from paligemma_jax.models.lora import add_lora
from paligemma_jax.models.paligemma import GraphDef, PaliGemma, split_model
from paligemma_jax.models.quantization import quantize_stacked
from paligemma_jax.models.sharding import NAMES, Axes, leaf_sharding, make_mesh
from paligemma_jax.processing.processor import Batch
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.distributed import state_shardings
from paligemma_jax.training.optimizer import OptimizerConfig, RunLength, make_optimizer
from paligemma_jax.training.step import StepConfig, TrainState, batch_loss, init_state
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.tensors import as_float_dtype
from paligemma_jax.weights.views import with_resolution

LOGIT_COPIES = 3  # logits, their exponentials, and their gradient
# Fractions of what one layer would keep that XLA holds at a time in its backward pass (measured):
# it fuses a part of what is computed again, and more of what it only reads from what was kept.
RECOMPUTED, KEPT = 0.9, 0.6
RUN = RunLength(total_steps=2, batch_size=1, data_size=1)  # of no consequence for memory
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
    """A batch of all devices together: examples, text tokens and images of each."""

    examples: int
    text: int
    images: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on each device.

    Attributes:
      trainable: master weights.
      frozen: the other weights.
      optimizer: the optimizer's state.
      ema: the moving average of the weights.
      batch: what the model is given.
      gradients: of the trainable weights, twice with gradient accumulation.
      update: of the largest weight; those of the others lie where gradients were.
      kept: activations that are kept from the forward pass for the gradient.
      layer: work inside one layer, and weights gathered from other devices.
      logits: those held at a time, and their gradient.
    """

    trainable: int
    frozen: int
    optimizer: int
    ema: int
    batch: int
    gradients: int
    update: int
    kept: int
    layer: int
    logits: int

    @property
    def resident(self) -> int:
        """What is there between steps."""
        return self.trainable + self.frozen + self.optimizer + self.ema + self.batch

    @property
    def total(self) -> int:
        """The peak: what is resident, and what the fullest phase of a step needs beside."""
        in_layers = self.kept + self.gradients + max(self.layer, self.logits)
        return self.resident + max(in_layers, self.gradients + self.update)

    def __str__(self) -> str:
        """A table, in GB."""
        values = {**vars(self), "total": self.total}
        return "\n".join(f"{name:<10} {value / 1e9:9.2f} GB" for name, value in values.items())


@dataclasses.dataclass(frozen=True)
class StepShapes:
    """Everything a step is made of, as shapes, on a mesh whose devices need not be there."""

    graphdef: GraphDef
    state: TrainState
    batch: Batch
    mesh: Any

    @classmethod
    def of(
        cls,
        model: nnx.Module,
        optimizer: OptimizerConfig,
        step: StepConfig,
        shape: BatchShape,
        axes: Axes,
        dtype: DType,
    ) -> "StepShapes":
        """Those of the arguments of `estimate_memory`; raises ConfigError."""
        array: Any = jax.ShapeDtypeStruct
        graphdef, arrays = split_model(model)
        shapes = {k: array(x.shape, x.dtype) for k, x in arrays.items()}
        transformation = make_optimizer(optimizer, shapes, RUN)
        paths, ema = optimizer.trainable(shapes), step.ema is not None
        state = jax.eval_shape(
            lambda arrays: init_state(arrays, paths, transformation, dtype=dtype, ema=ema), shapes
        )
        size = graphdef.merge_flat(shapes).config.img.image_size
        text = array((shape.examples, shape.text + 1), jnp.int32)
        pixels = array((shape.examples, shape.images, size, size, 3), jnp.float32)
        images = pixels if shape.images else None
        batch = Batch(images=images, tokens=text, mask_ar=text, mask_input=text, mask_loss=text)
        return cls(graphdef, state, batch, jax.sharding.AbstractMesh(axes.sizes, NAMES))


def estimate_memory(
    model: nnx.Module,
    optimizer: OptimizerConfig,
    step: StepConfig,
    shape: BatchShape,
    *,
    axes: Axes = Axes(),  # noqa: B008
    dtype: DType = jnp.float32,
) -> MemoryEstimate:
    """What a training step of `model` takes; it may be of shapes alone (`abstract_model`).

    `dtype` is that of the master weights; the model's own are those of the frozen weights and of
    activations. `axes` are sizes of a mesh whose devices need not be there. Raises ConfigError.
    """
    shapes = StepShapes.of(model, optimizer, step, shape, axes, dtype)
    graphdef, state, batch, mesh = shapes.graphdef, shapes.state, shapes.batch, shapes.mesh
    own = state_shardings(state, mesh)

    def held(tree: Any, shardings: Any) -> int:
        return sum(map(_bytes, jax.tree.leaves(tree), jax.tree.leaves(shardings)))

    trainable = held(state.trainable, own.trainable)
    parts, ways = step.gradient_accumulation_steps, mesh.shape["data"] * mesh.shape["fsdp"]
    local: Any = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] // (ways * parts), *x.shape[1:]), x.dtype), batch
    )
    kept, kept_of_layer = _residuals(graphdef, state, local, step)
    _, layer = _residuals(graphdef, state, local, dataclasses.replace(step, remat="none"))
    work = int(RECOMPUTED * (layer - kept_of_layer) + KEPT * kept_of_layer)
    vocabulary = graphdef.merge_flat(state.params).config.llm.vocab_size
    columns = min(step.logit_chunk, step.max_targets or shape.text, shape.text)
    logits = local.tokens.shape[0] * columns * vocabulary * 4 // mesh.shape["tensor"]
    return MemoryEstimate(
        trainable=trainable,
        frozen=held(state.frozen, own.frozen),
        optimizer=held(state.opt_state, own.opt_state),
        ema=held(state.ema, own.ema),
        batch=sum(map(_bytes, jax.tree.leaves(batch))) // ways,
        gradients=trainable * (1 if parts == 1 else 2),
        update=max(_bytes(x, own.trainable[k]) for k, x in state.trainable.items()),
        kept=kept,
        layer=work + _gathered(state, mesh),
        logits=LOGIT_COPIES * logits,
    )


def _residuals(
    graphdef: GraphDef, state: TrainState, batch: Batch, step: StepConfig
) -> tuple[int, int]:
    """Bytes that the gradient keeps of the forward pass: of all layers, and most of one."""

    def pullback(trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> Any:
        def loss(trainable: Any) -> jax.Array:
            weights = jnp.ones((batch.tokens.shape[0], batch.tokens.shape[1] - 1))
            model = graphdef.merge_flat({**frozen, **trainable})
            return batch_loss(model, batch, weights, step, key)

        return jax.vjp(loss, trainable)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.make_jaxpr(pullback)(state.trainable, state.frozen, batch, key).jaxpr
    given = {id(v) for v in (*program.invars, *program.constvars)}
    kept = {id(v): v for v in program.outvars if isinstance(v, Var)}
    layers = [0]
    for scan in (equation for equation in program.eqns if equation.primitive.name == "scan"):
        body = getattr(scan.params["jaxpr"], "jaxpr", scan.params["jaxpr"])
        stacked = [  # what the scan gives for each layer; the rest is carried to the next
            _bytes(whole.aval)
            for whole, one in zip(scan.outvars, body.outvars, strict=True)
            if whole.aval.ndim > one.aval.ndim and id(whole) in kept
        ]
        layers.append(sum(stacked) // scan.params["length"])
    return sum(_bytes(v.aval) for number, v in kept.items() if number not in given), max(layers)


def _gathered(state: TrainState, mesh: Any) -> int:
    """Weights of one layer, and the embedding table, as far as they come from other devices."""
    size = 0
    for path, leaf in state.params.items():
        missing = _bytes(leaf) // mesh.shape["tensor"]
        missing -= _bytes(leaf, leaf_sharding(path, leaf, mesh))
        stacked = path.startswith("llm/layers/")
        if stacked or path == "llm/embedder/input_embedding":
            size += max(missing, 0) // (leaf.shape[0] if stacked else 1)
    return size


def _bytes(leaf: Any, sharding: Any = None) -> int:
    """Bytes of an array or a shape; with `sharding` those on one device."""
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def ways_to_fit(
    memory: int, estimate: Callable[[StepConfig], MemoryEstimate], step: StepConfig, local: int
) -> list[tuple[StepConfig, MemoryEstimate]]:
    """Ways to train in `memory` bytes a device, the fastest first, with `local` examples on each.

    They differ from `step` in `remat` and `gradient_accumulation_steps`.
    """
    least = step.gradient_accumulation_steps
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n >= least and local % n == 0]
    found = []
    for remat in ("none", "dots", "full"):
        for count in counts:
            changed = dataclasses.replace(step, remat=remat, gradient_accumulation_steps=count)
            if (needed := estimate(changed)).total <= memory:
                found.append((changed, needed))
                break
    # Each part of a batch reads all weights once more; recomputing costs a third.
    return sorted(found, key=lambda one: one[0].gradient_accumulation_steps)


def describe_memory(config: TrainConfig, memory: int | None = None, *, brief: bool = False) -> str:
    """A table of bytes a device; where that is more than `memory`, what would fit into so much.

    Of a published model the files need not be there. `brief` is two lines for the start of a run,
    and nothing where the memory cannot be estimated. Raises CheckpointError and ConfigError.
    """
    try:
        return "\n".join(_describe(config, memory, brief))
    except Exception as e:
        if not brief:
            raise
        _log.debug("The memory could not be estimated: %s", e)
        return ""


def _describe(config: TrainConfig, memory: int | None, brief: bool) -> Iterable[str]:
    mesh, dtype = make_mesh(config.mesh), as_float_dtype(config.dtype)
    architecture = with_resolution(_architecture(config.model), config.resolution)

    def make_model() -> PaliGemma:
        model = PaliGemma(architecture, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
        if config.quantize is not None:
            model = quantize_stacked(model, config.quantize)
        return model if config.lora is None else add_lora(model, config.lora, nnx.Rngs(0))

    def estimate(step: StepConfig) -> MemoryEstimate:
        shape = BatchShape(examples=config.batch_size, text=config.text_length)
        options: Any = dict(axes=Axes(**mesh.shape), dtype=as_float_dtype(config.master_dtype))
        return estimate_memory(model, config.optimizer_config, step, shape, **options)

    model = nnx.eval_shape(make_model)
    found = estimate(config.step_config)
    if brief:
        kept = found.resident - found.batch
        yield f"memory: {found.total / 1e9:.2f} GB a device ({mesh.size}), estimated"
        yield (
            f"  weights and optimizer {kept / 1e9:.2f}, gradients {found.gradients / 1e9:.2f}, "
            f"kept for the backward pass {found.kept / 1e9:.2f}"
        )
    else:
        devices = f"{mesh.size} device{'s' if mesh.size > 1 else ''}, each"
        yield f"{config.model}, {config.batch_size} examples, {devices}:"
        yield str(found)
    if memory is not None and found.total > memory:
        yield f"That is more than {memory / 1e9:.1f} GB. What fits:"
        local = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
        ways = ways_to_fit(memory, estimate, config.step_config, local)
        for step, one in ways:
            yield (
                f"  --config.remat='{step.remat}' --config.gradient_accumulation_steps="
                f"{step.gradient_accumulation_steps}: {one.total / 1e9:.1f} GB"
            )
        if not ways:
            yield "  nothing with this batch: train adapters (--config lora_24gb, --config qlora)"


def device_memory() -> int | None:
    """Bytes of one device; None where it does not say, as CPUs."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _architecture(name: str) -> PaliGemmaConfig:
    try:
        path = find_checkpoint(name, local_only=True)
    except CheckpointError:
        published = published_name(name)
        if published is None:
            raise
        return VARIANTS[published]
    with open_checkpoint(path) as checkpoint:
        return checkpoint.config
