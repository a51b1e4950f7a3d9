"""transformers' PaliGemma trained as its Trainer does it, with PEFT where adapters are trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.benchmark.huggingface import load_huggingface
from paligemma_jax.benchmark.implementation import Precision
from paligemma_jax.benchmark.resident import forget_most_resident, most_resident
from paligemma_jax.benchmark.task import Task
from paligemma_jax.benchmark.train_adapter import adapter_directory
from paligemma_jax.benchmark.train_case import TrainSteps
from paligemma_jax.benchmark.train_inputs import TrainInputs
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import MissingExtraError

IGNORED = -100  # as a label


class HuggingFaceTrainer:
    """A PaliGemmaForConditionalGeneration behind `Trainer`.

    What `Trainer(bf16=True, gradient_checkpointing=True)` does at each step, without its logging:
    forward under autocast (in bfloat16), backward, clipping, fused AdamW.
    """

    def __init__(self, model: Any, batch: dict[str, Any], autocast: bool, learning_rate: float):
        import torch

        self._model, self._batch = model, batch
        self._where = batch["input_ids"].device.type
        self._autocast = autocast
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
            fused=True,
        )  # fmt: skip

    def step(self) -> float:
        """See `Trainer`."""
        import torch

        with torch.autocast(self._where, torch.bfloat16, enabled=self._autocast):
            loss = self._model(**self._batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._where == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    def forget_peak(self) -> None:
        """See `Trainer`."""
        import torch

        if self._where == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_most_resident()

    def peak_bytes(self) -> int:
        """See `Trainer`."""
        import torch

        return torch.cuda.max_memory_allocated() if self._where == "cuda" else most_resident()


def open_huggingface_trainer(
    weights: Path, config: PaliGemmaConfig, dtype: Precision, case: TrainSteps
) -> HuggingFaceTrainer:
    """Loads the Hugging Face directory: masters in float32, frozen weights in `dtype`.

    Raises MissingExtraError without torch, transformers or, for adapters, peft.
    """
    lora = case.task is Task.LORA
    model = load_huggingface(weights, dtype.value if lora else Precision.FLOAT32.value)
    model.config.use_cache = False
    # Without the rows that fill up the table, which would be a part of its softmax alone.
    model.resize_token_embeddings(config.llm.vocab_size)
    model.model.vocab_size = config.llm.vocab_size  # left as it was: image tokens lie beyond now
    batch = _batch(model, case.inputs(config))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora:
        model = _with_adapters(model, adapter_directory(weights, config))
    autocast = dtype is not Precision.FLOAT32
    return HuggingFaceTrainer(model.train(), batch, autocast, case.learning_rate)


def _with_adapters(model: Any, directory: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as e:
        raise MissingExtraError("Measuring PEFT", "parity") from e
    load: Callable[..., Any] = PeftModel.from_pretrained
    return load(model, directory, is_trainable=True)


def _batch(model: Any, inputs: TrainInputs) -> dict[str, Any]:
    """What PaliGemmaProcessor makes of prompts and suffixes: token types are 1 in suffixes."""
    import torch

    config = model.config
    rows, where = len(inputs.tokens), model.device
    pictures = np.full((rows, config.text_config.num_image_tokens), config.image_token_id)
    ids = np.concatenate([pictures, inputs.tokens], axis=1).astype(np.int64)
    types = np.concatenate([np.zeros_like(pictures), inputs.in_suffix], axis=1).astype(np.int64)
    pixels = torch.tensor(np.ascontiguousarray(np.moveaxis(inputs.images, -1, 1)))
    return {
        "input_ids": torch.tensor(ids, device=where),
        "attention_mask": torch.ones(ids.shape, dtype=torch.int64, device=where),
        "token_type_ids": torch.tensor(types, device=where),
        "labels": torch.tensor(np.where(types == 1, ids, IGNORED), device=where),
        "pixel_values": pixels.to(where, model.dtype),
    }
