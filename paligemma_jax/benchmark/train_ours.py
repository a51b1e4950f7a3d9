"""This library's training step, as `paligemma train` makes it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from paligemma_jax.benchmark.implementation import Precision
from paligemma_jax.benchmark.memory import forget_peak, peak_bytes
from paligemma_jax.benchmark.task import Task
from paligemma_jax.benchmark.train_adapter import adapter_directory
from paligemma_jax.benchmark.train_case import TrainSteps
from paligemma_jax.benchmark.train_inputs import TrainInputs
from paligemma_jax.models.lora import LoRA
from paligemma_jax.models.skeleton import take_apart
from paligemma_jax.processing.batch import Batch
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.optimizer import AdamW, make_optimizer
from paligemma_jax.training.schedules import Constant, Run
from paligemma_jax.training.sharding import place_batch, state_shardings
from paligemma_jax.training.start import load_base
from paligemma_jax.training.state import TrainState, init_state
from paligemma_jax.training.step import TrainStep, make_train_step
from paligemma_jax.weights.peft import load_adapter

_RUN = Run(total_steps=100, batch_size=1, data_size=1)  # of no consequence: the rate is constant


class OurTrainer:
    """A state and its step behind `Trainer`."""

    def __init__(self, step: TrainStep, state: TrainState, batch: Batch):
        self._step, self._state, self._batch = step, state, batch
        self._key = jax.random.key(0)

    def step(self) -> float:
        """See `Trainer`."""
        self._state, metrics = self._step(self._state, self._batch, self._key)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def forget_peak(self) -> None:
        """See `Trainer`; a device forgets nothing, and nothing before a step takes as much."""
        forget_peak()

    def peak_bytes(self) -> int:
        """See `Trainer`."""
        return peak_bytes()

    def compiled_bytes(self) -> dict[str, float]:
        """What the program of a step holds, by XLA's own account: what it is given and beside."""
        shapes: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._state)
        found: Any = self._step.lower(shapes, self._batch, self._key).compile().memory_analysis()
        return {
            "given_bytes": found.argument_size_in_bytes,
            "temporary_bytes": found.temp_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes,
        }


def open_our_trainer(weights: Path, dtype: Precision, case: TrainSteps) -> OurTrainer:
    """Loads a checkpoint as training does: masters in float32, all else in `dtype`."""
    lora = LoRA() if case.task is Task.LORA else None
    config = TrainConfig(
        model=str(weights),
        lora=lora,
        learning_rate=case.learning_rate,
        method=AdamW(weight_decay=0.0),
        schedule=Constant(),
        dtype=dtype.value,
        final_logit_softcap=None,
    )
    # One device, as the peer has one, wherever there are more.
    devices = np.array(jax.local_devices()[:1]).reshape(1, 1, 1)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    model = load_base(config, mesh)
    if lora is not None:
        model = load_adapter(model, adapter_directory(weights, model.config))
    inputs = case.inputs(model.config)
    skeleton, arrays = take_apart(model)
    del model
    optimizer = make_optimizer(config.optimizer, arrays, _RUN)
    state = init_state(arrays, config.optimizer.trainable(arrays), optimizer)
    del arrays
    shardings = state_shardings(state, mesh)
    state = jax.block_until_ready(jax.device_put(state, shardings))
    step = make_train_step(skeleton, optimizer, config.step_config, shardings=shardings)
    batch = train_batch(inputs)
    placed = place_batch(batch, mesh)
    # The mask stays here and tells the step how much is to learn, as in training.
    batch = dataclasses.replace(placed, mask_loss=batch.mask_loss)
    return OurTrainer(step, state, batch)


def train_batch(inputs: TrainInputs) -> Batch:
    """As `Processor.encode_train` makes it."""
    suffix = inputs.in_suffix.astype(np.int32)
    return Batch(
        images=inputs.images[:, None],
        tokens=inputs.tokens,
        mask_ar=suffix,
        mask_input=np.ones(inputs.tokens.shape, bool),
        mask_loss=suffix,
    )
