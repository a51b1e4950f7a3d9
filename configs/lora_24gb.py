"""LoRA adapters on a 3B model, for a GPU of 24 GB such as an RTX 3090, 4090, L4 or A10G.

    paligemma train --config lora_24gb:data=train.jsonl --workdir DIR

WORKDIR/adapter is for PEFT, and so for Hugging Face and Roboflow; WORKDIR/model is merged.
"""

from ml_collections import ConfigDict

from paligemma_jax.models.lora import LoRA
from paligemma_jax.training.config import load_config
from paligemma_jax.training.optimizer import Epochs


def get_config(arg: str = "") -> ConfigDict:
    config = load_config(f"base:{arg}")
    with config.unlocked():
        config.lora = LoRA(rank=16, alpha=32.0)  # every linear layer of the language model
        config.learning_rate = 2e-4
        config.weight_decay = 0.0
        config.batch_size = 16
        config.gradient_accumulation_steps = 4
        config.duration = Epochs(5)
    return config
