"""New LoRA adapters as a PEFT directory, for every implementation to begin training from.

What an adapter begins with is random, and decides the losses after the first step.
"""

import json
import zlib
from pathlib import Path

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.hf_names import hf_tensors
from paligemma_jax.weights.safetensors_writer import write_tensors
from paligemma_jax.weights.staging import staged
from paligemma_jax.weights.tree import expected_shapes

RANK = 8
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_directory(weights: Path, config: PaliGemmaConfig) -> Path:
    """The adapters that belong to the checkpoint `weights`; written if they are not there yet.

    On every product of the language model's layers, of rank 8 and scale 1: lora_A uniform within
    1/sqrt(inputs), as PEFT draws it, and lora_B zero.
    """
    folder = weights.with_name(f"{weights.name}-lora{RANK}")
    if folder.exists():
        return folder
    tensors = dict(_tensors(config))
    with staged(folder, sum(tensor.nbytes for tensor in tensors.values())) as directory:
        values = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": RANK,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": rf".*language_model.*\.({'|'.join(_MODULES)})",
        }
        (directory / "adapter_config.json").write_text(json.dumps(values, indent=2))
        write_tensors(directory / "adapter_model.safetensors", tensors)
    return folder


def _tensors(config: PaliGemmaConfig):
    ours = expected_shapes(config)
    for tensor in hf_tensors(config):
        if tensor.key.rpartition(".")[0].rpartition(".")[2] not in _MODULES:
            continue
        if not tensor.path.startswith("llm/layers/"):
            continue
        depth, *whole = ours[tensor.path]
        outs, ins = tensor.shape(tuple(whole if tensor.part is None else whole[1:]))
        for layer in range(depth):
            name = f"base_model.model.model.{tensor.key.format(layer).removesuffix('.weight')}"
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            bound = ins**-0.5
            a = rng.uniform(-bound, bound, (RANK, ins)).astype(np.float32)
            yield f"{name}.lora_A.weight", a
            yield f"{name}.lora_B.weight", np.zeros((outs, RANK), np.float32)
