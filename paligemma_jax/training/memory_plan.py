"""How much memory a step takes on each device, told before anything is allocated.

The model is traced with shapes alone, once as it is to be trained and once keeping everything: what
a gradient keeps is then known exactly, and the work inside a layer is near to what one would keep.
The rest is arithmetic. On a CPU the total is within a tenth of what XLA reserves (full training of
PaliGemma 3B in float32: 51.61 GB said, 51.61 GB reserved); on several devices it is an estimate, in
which activations are not split over the axis "tensor".

The memory that a run would take, before anything is loaded.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable
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
from paligemma_jax.training.optimizer import OptimizerConfig, Run, make_optimizer
from paligemma_jax.training.step import (
    StepConfig,
    TrainState,
    batch_loss,
    init_state,
    make_train_step,
)
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.tensors import as_float_dtype
from paligemma_jax.weights.views import with_resolution

LOGIT_COPIES = 3  # logits, their exponentials, and the gradient in them
# Shares of what one layer would keep that XLA has at a time in its backward pass (measured): it
# fuses a part of what is computed again, and more of what it only reads from what was kept.
MADE_AGAIN, KEPT = 0.9, 0.6
RUN = Run(total_steps=2, batch_size=1, data_size=1)  # of no consequence for memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
    """A batch of all devices together: rows, pictures a row, text tokens a row."""

    rows: int
    text: int
    images: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on each device.

    Attributes:
      trainable: master weights.
      frozen: the other weights.
      optimizer: the optimizer's state.
      average: the moving average of the weights.
      batch: what the model is given.
      gradients: of the trainable weights, twice with microbatches.
      update: of the largest weight; those of the others lie where gradients were.
      kept: activations that are kept from the forward pass for the gradient.
      layer: work inside one layer, and weights gathered from other devices.
      logits: those held at a time, and their gradient.
    """

    trainable: int
    frozen: int
    optimizer: int
    average: int
    batch: int
    gradients: int
    update: int
    kept: int
    layer: int
    logits: int

    @property
    def resident(self) -> int:
        """What is there between steps."""
        return self.trainable + self.frozen + self.optimizer + self.average + self.batch

    @property
    def working(self) -> int:
        """What a step needs beside, in the fullest of its phases."""
        through_layers = self.kept + self.gradients + self.layer
        at_the_end = self.kept + self.gradients + self.logits
        return max(through_layers, at_the_end, self.gradients + self.update)

    @property
    def total(self) -> int:
        """The most that is there at a time."""
        return self.resident + self.working

    def __str__(self) -> str:
        """A table, in GB."""
        lines = [f"{name:<10} {value / 1e9:9.2f} GB" for name, value in vars(self).items()]
        return "\n".join([*lines, f"{'total':<10} {self.total / 1e9:9.2f} GB a device"])


@dataclasses.dataclass(frozen=True)
class StepShapes:
    """Everything a step is made of, as shapes."""

    graphdef: GraphDef
    state: TrainState
    batch: Batch
    mesh: Any

    @property
    def rows(self) -> int:
        """Devices that the rows of a batch are split over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]


def plan_memory(
    model: nnx.Module,
    optimizer: OptimizerConfig,
    step: StepConfig,
    shape: BatchShape,
    *,
    axes: Axes | None = None,
    dtype: DType = jnp.float32,
) -> MemoryPlan:
    """What a training step of `model` takes; it may be of shapes alone (`abstract_model`).

    `dtype` is that of the master weights; the model's own are those of the frozen weights and of
    activations. `axes` are sizes of a mesh whose devices need not be there. Raises ConfigError.
    """
    subject = step_shapes(model, optimizer, step, shape, axes or Axes(), dtype)
    state, mesh = subject.state, subject.mesh
    own = state_shardings(state, mesh)

    def held(tree: Any, shardings: Any) -> int:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        return sum(_bytes(sharding.shard_shape(leaf.shape), leaf.dtype) for leaf, sharding in pairs)

    trainable = held(state.trainable, own.trainable)
    parts = step.microbatches
    local = jax.tree.map(lambda x: _rows(x, x.shape[0] // (subject.rows * parts)), subject.batch)
    kept, kept_of_layer = _residuals(subject.graphdef, state, local, step)
    everything = dataclasses.replace(step, remat="none")
    _, layer = _residuals(subject.graphdef, state, local, everything)
    work = int(MADE_AGAIN * (layer - kept_of_layer) + KEPT * kept_of_layer)
    config = subject.graphdef.merge_flat({**state.trainable, **state.frozen}).config.llm
    columns = min(step.logit_columns, step.most_supervised or shape.text, shape.text)
    logits = local.tokens.shape[0] * columns * config.vocab_size * 4 // mesh.shape["tensor"]
    return MemoryPlan(
        trainable=trainable,
        frozen=held(state.frozen, own.frozen),
        optimizer=held(state.opt_state, own.opt_state),
        average=held(state.ema, own.ema),
        batch=sum(_bytes(x.shape, x.dtype) for x in jax.tree.leaves(subject.batch)) // subject.rows,
        gradients=trainable * (1 if parts == 1 else 2),
        update=max(held({k: x}, {k: own.trainable[k]}) for k, x in state.trainable.items()),
        kept=kept,
        layer=work + _gathered(state, mesh),
        logits=LOGIT_COPIES * logits,
    )


def compiled_memory(
    model: nnx.Module,
    optimizer: OptimizerConfig,
    step: StepConfig,
    shape: BatchShape,
    *,
    dtype: DType = jnp.float32,
) -> int:
    """Bytes that XLA reserves on one device for what `plan_memory` estimates; compiles the step."""
    subject = step_shapes(model, optimizer, step, shape, Axes(), dtype)
    transformation = make_optimizer(optimizer, subject.graphdef.paths, RUN)
    program = make_train_step(subject.graphdef, transformation, step)
    key = jax.eval_shape(lambda: jax.random.key(0))
    found: Any = program.lower(subject.state, subject.batch, key).compile().memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + new


def what_fits(
    memory: int,
    model: nnx.Module,
    optimizer: OptimizerConfig,
    step: StepConfig,
    shape: BatchShape,
    *,
    axes: Axes | None = None,
    dtype: DType = jnp.float32,
) -> list[tuple[StepConfig, MemoryPlan]]:
    """Ways to train with this batch in `memory` bytes a device, the fastest first.

    They differ from `step` in what layers keep for the gradient and in the number of microbatches.
    """
    rows = math.prod(size for size in (axes or Axes()).sizes[:2])
    local = shape.rows // rows
    parts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n >= step.microbatches and local % n == 0]
    found = []
    for remat in ("none", "dots", "full"):
        for count in parts:
            changed = dataclasses.replace(step, remat=remat, microbatches=count)
            plan = plan_memory(model, optimizer, changed, shape, axes=axes, dtype=dtype)
            if plan.total <= memory:
                found.append((changed, plan))
                break
    # Each microbatch reads all weights once more; computing again costs a third.
    return sorted(found, key=lambda one: one[0].microbatches)


def step_shapes(
    model: nnx.Module,
    optimizer: OptimizerConfig,
    step: StepConfig,
    shape: BatchShape,
    axes: Axes,
    dtype: DType,
) -> StepShapes:
    """What `plan_memory` looks at; its arguments are the same. Raises ConfigError."""
    graphdef, arrays = split_model(model)
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()}
    transformation = make_optimizer(optimizer, shapes, RUN)
    paths = optimizer.trainable(shapes)
    ema = step.ema is not None
    state = jax.eval_shape(
        lambda arrays: init_state(arrays, paths, transformation, dtype=dtype, ema=ema), shapes
    )
    size = graphdef.merge_flat(shapes).config.img.image_size
    text: Any = jax.ShapeDtypeStruct((shape.rows, shape.text + 1), jnp.int32)
    pictures = (shape.rows, shape.images, size, size, 3)
    images: Any = jax.ShapeDtypeStruct(pictures, jnp.float32) if shape.images else None
    batch = Batch(images=images, tokens=text, mask_ar=text, mask_input=text, mask_loss=text)
    mesh = jax.sharding.AbstractMesh(axes.sizes, NAMES)
    return StepShapes(graphdef, state, batch, mesh)


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
    total = _sizes(v for number, v in kept.items() if number not in given)
    layers = [0]
    for equation in program.eqns:
        if equation.primitive.name == "scan":
            stacked = _stacked_outputs(equation)
            of_all = _sizes(v for v in stacked if id(v) in kept)
            layers.append(of_all // equation.params["length"])
    return total, max(layers)


def _stacked_outputs(scan: Any) -> list[Any]:
    """What a scan gives for each of its steps; the rest is carried from one to the next."""
    step = getattr(scan.params["jaxpr"], "jaxpr", scan.params["jaxpr"])
    pairs = zip(scan.outvars, step.outvars, strict=True)
    return [whole for whole, one in pairs if whole.aval.ndim > one.aval.ndim]


def _gathered(state: TrainState, mesh: Any) -> int:
    """Weights of one layer, and the token table, as far as they come from other devices."""
    size = 0
    for path, leaf in state.params.items():
        own = _bytes(leaf_sharding(path, leaf, mesh).shard_shape(leaf.shape), leaf.dtype)
        missing = _bytes(leaf.shape, leaf.dtype) // mesh.shape["tensor"] - own
        stacked = path.startswith("llm/layers/")
        if stacked or path == "llm/embedder/input_embedding":
            size += max(missing, 0) // (leaf.shape[0] if stacked else 1)
    return size


def _rows(x: Any, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)


def _sizes(variables: Iterable[Any]) -> int:
    return sum(_bytes(v.aval.shape, v.aval.dtype) for v in variables)


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * dtype.itemsize


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
        path = find_checkpoint(name, local_only=True)
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
