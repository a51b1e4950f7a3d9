"""Training steps of this library and of transformers with PEFT, from the same weights and batch.

Letters: B batch, H W pixels, T text tokens.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from paligemma_jax.benchmark import Precision, huggingface, ours
from paligemma_jax.benchmark.cases import TrainSteps
from paligemma_jax.benchmark.measure import reset_peak_resident
from paligemma_jax.benchmark.subjects import random_prompts
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import MissingExtraError
from paligemma_jax.filesystem import staged
from paligemma_jax.models.lora import LoRA
from paligemma_jax.models.paligemma import split_model
from paligemma_jax.processing.processor import Batch
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.distributed import place_batch, state_shardings
from paligemma_jax.training.logging import peak_flops
from paligemma_jax.training.optimizer import AdamW, Constant, RunLength, make_optimizer
from paligemma_jax.training.setup import load_base
from paligemma_jax.training.step import TrainState, TrainStep, init_state
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.huggingface import hf_tensors
from paligemma_jax.weights.peft import load_adapter
from paligemma_jax.weights.safetensors_io import write_tensors
from paligemma_jax.weights.tensors import expected_shapes

RANK = 8  # of adapters
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SCHEDULE = RunLength(total_steps=100, batch_size=1, data_size=1)  # the learning rate is constant
_IGNORED = -100  # as a label


def _learning_rate(case: TrainSteps) -> float:
    """As in this library's configs."""
    return 2e-4 if case.lora else 1e-5


def _examples(
    config: PaliGemmaConfig, case: TrainSteps
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images f32[B, H, W, 3], tokens i32[B, T] without padding, and what to learn i32[B, T].

    Examples have equally many tokens, so that the mean over examples (ours) is the mean over tokens
    (Hugging Face's). T counts the last one, which no model reads.
    """
    images, tokens = random_prompts(config, case.batch, case.text + 1)
    suffix = np.arange(case.text + 1) >= case.text + 1 - case.suffix
    return images, tokens, np.broadcast_to(suffix, tokens.shape).astype(np.int32)


class OurTrainer:
    """A train state and its step as a `Trainer`."""

    def __init__(self, step: TrainStep, state: TrainState, batch: Batch):
        self._step, self._state, self._batch = step, state, batch
        self._key = jax.random.key(0)

    def step(self) -> float:
        self._state, metrics = self._step(self._state, self._batch, self._key)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def reset_peak(self) -> None:
        """As of `Trainer`; devices cannot, and nothing before a step takes as much."""
        ours.reset_peak()

    def peak_bytes(self) -> int:
        return ours.peak_bytes()

    def numbers(self) -> dict[str, float]:
        """What a step is given and takes beside it, by XLA's account; peak FLOP/s by datasheet."""
        shapes: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._state)
        found: Any = self._step.lower(shapes, self._batch, self._key).compile().memory_analysis()
        memory = {
            "argument_bytes": found.argument_size_in_bytes,
            "temporary_bytes": found.temp_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes,
        }
        peak = peak_flops()
        return memory | ({} if peak is None else {"datasheet_flops": peak})


def load_our_trainer(weights: Path, dtype: Precision, case: TrainSteps) -> OurTrainer:
    """Loads a checkpoint as `paligemma train` does: masters in float32, the rest in `dtype`."""
    lora = LoRA() if case.lora else None
    config = TrainConfig(
        model=str(weights),
        lora=lora,
        learning_rate=_learning_rate(case),
        optimizer=AdamW(weight_decay=0.0),
        schedule=Constant(),
        dtype=dtype.value,
        final_logit_softcap=None,
    )
    # One device, as the baseline has, wherever there are more.
    devices = np.array(jax.local_devices()[:1]).reshape(1, 1, 1)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    with open_checkpoint(weights) as checkpoint:
        model = load_base(config, checkpoint, mesh)
    if lora is not None:
        model = load_adapter(model, adapter_directory(weights, model.config))
    batch = train_batch(model.config, case)
    graphdef, arrays = split_model(model)
    del model
    optimizer = make_optimizer(config.optimizer_config, arrays, _SCHEDULE)
    state = init_state(arrays, config.optimizer_config.trainable(arrays), optimizer)
    del arrays
    shardings = state_shardings(state, mesh)
    state = jax.block_until_ready(jax.device_put(state, shardings))
    step = TrainStep(graphdef, optimizer, config.step_config, shardings=shardings)
    # The mask stays here and tells the step how much is to learn, as in training.
    batch = dataclasses.replace(place_batch(batch, mesh), mask_loss=batch.mask_loss)
    return OurTrainer(step, state, batch)


def train_batch(config: PaliGemmaConfig, case: TrainSteps) -> Batch:
    """As `Processor.encode_train` makes it."""
    images, tokens, suffix = _examples(config, case)
    return Batch(
        images=images[:, None],
        tokens=tokens,
        mask_ar=suffix,
        mask_input=np.ones(tokens.shape, bool),
        mask_loss=suffix,
    )


class HuggingFaceTrainer:
    """A PaliGemmaForConditionalGeneration as a `Trainer`.

    It does what transformers' `Trainer(bf16=True, gradient_checkpointing=True)` does at each step,
    without its logging: forward under autocast (in bfloat16), backward, clipping, fused AdamW.
    """

    def __init__(self, model: Any, batch: dict[str, Any], autocast: bool, learning_rate: float):
        import torch

        self._model, self._batch = model, batch
        self._device = batch["input_ids"].device.type
        self._autocast = autocast
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
            fused=True,
        )  # fmt: skip

    def step(self) -> float:
        import torch

        with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
            loss = self._model(**self._batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    def reset_peak(self) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak_resident()

    def peak_bytes(self) -> int:
        return huggingface.peak_bytes(self._model)

    def numbers(self) -> dict[str, float]:
        """As of `Trainer`: nothing."""
        return {}


def load_huggingface_trainer(
    weights: Path, config: PaliGemmaConfig, dtype: Precision, case: TrainSteps
) -> HuggingFaceTrainer:
    """Loads a Hugging Face directory: masters in float32, frozen weights in `dtype`.

    Raises MissingExtraError without torch, transformers or, for adapters, peft.
    """
    stored = dtype if case.lora else Precision.FLOAT32
    model = huggingface.load_model(weights, stored.value)
    model.config.use_cache = False
    # Without the padding of the embedding table, which would be a part of its softmax alone.
    model.resize_token_embeddings(config.llm.vocab_size)
    model.model.vocab_size = config.llm.vocab_size  # it is left as it was: image tokens are beyond
    images, tokens, suffix = _examples(config, case)
    batch = huggingface.model_inputs(model, (images, tokens), suffix)
    learned = batch["token_type_ids"] == 1
    batch["labels"] = batch["input_ids"].masked_fill(~learned, _IGNORED)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.lora:
        try:
            from peft import PeftModel
        except ImportError as e:
            raise MissingExtraError("Measuring PEFT", "parity") from e
        load: Callable[..., Any] = PeftModel.from_pretrained
        model = load(model, adapter_directory(weights, config), is_trainable=True)
    autocast = dtype is not Precision.FLOAT32
    return HuggingFaceTrainer(model.train(), batch, autocast, _learning_rate(case))


def adapter_directory(weights: Path, config: PaliGemmaConfig) -> Path:
    """The PEFT directory of new adapters for the checkpoint `weights`; written if it is missing.

    On every linear layer of the language model, of rank 8 and scale 1: lora_A uniform within
    1/sqrt(inputs), as PEFT initializes it, and lora_B zero.
    """
    folder = weights.with_name(f"{weights.name}-lora{RANK}")
    if folder.exists():
        return folder
    tensors = dict(_adapter_tensors(config))
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf".*language_model.*\.({'|'.join(_TARGETS)})",
    }
    with staged(folder, sum(tensor.nbytes for tensor in tensors.values())) as directory:
        (directory / "adapter_config.json").write_text(json.dumps(values, indent=2))
        write_tensors(directory / "adapter_model.safetensors", tensors)
    return folder


def _adapter_tensors(config: PaliGemmaConfig) -> Iterator[tuple[str, np.ndarray]]:
    shapes = expected_shapes(config)
    for tensor in hf_tensors(config):
        module = tensor.key.removesuffix(".weight")
        if not tensor.path.startswith("llm/layers/") or module.split(".")[-1] not in _TARGETS:
            continue
        depth, *shape = shapes[tensor.path]
        outs, ins = tensor.shape(tuple(shape if tensor.part is None else shape[1:]))
        for layer in range(depth):
            name = f"base_model.model.model.{module.format(layer)}"
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            a = rng.uniform(-(ins**-0.5), ins**-0.5, (RANK, ins)).astype(np.float32)
            yield f"{name}.lora_A.weight", a
            yield f"{name}.lora_B.weight", np.zeros((outs, RANK), np.float32)
