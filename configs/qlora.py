"""LoRA adapters over 4-bit weights (QLoRA): a 3B model in 8 GB, a 10B one in 16 GB.

    paligemma train --config qlora:data=train.jsonl,size=10b --workdir DIR

WORKDIR/model has the adapters merged into the weights as they were before quantization.
"""

from ml_collections import ConfigDict

from paligemma_jax.models.quantization_config import Int4
from paligemma_jax.training.config import load_config


def get_config(arg: str = "") -> ConfigDict:
    config = load_config(f"lora_24gb:{arg}")
    with config.unlocked():
        config.quantize = Int4()
        config.gradient_accumulation_steps = 8
    return config
