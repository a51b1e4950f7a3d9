"""Attention layers of the language model only, for a T4 with 16 GB: as big_vision's notebook.

    paligemma train --config attention_only_t4:data=train.jsonl --workdir DIR

SGD keeps no moments, and frozen weights are in float16. LoRA (lora_24gb, qlora) learns as much with
less memory.
"""

from ml_collections import ConfigDict

from paligemma_jax.training.config import load_config
from paligemma_jax.training.optimizer import SGD, Cosine, Examples, Fraction, Steps


def get_config(arg: str = "") -> ConfigDict:
    config = load_config(f"base:{arg}")
    with config.unlocked():
        config.trainable = "llm/layers/attn/.*"
        config.optimizer = SGD()
        config.learning_rate = 0.03
        config.schedule = Cosine(warmup=Fraction(0.1))
        config.weight_decay = 0.0
        config.max_grad_norm = None
        config.batch_size = 8
        config.duration = Examples(512)
        config.evaluate_every = Steps(16)
        config.dtype = "float16"  # a T4 has no bfloat16
    return config
