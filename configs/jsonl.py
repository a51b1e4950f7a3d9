"""Fine-tunes on your own images with prompts and answers; copy this file and change it.

    {"image": "cat.jpg", "prefix": "caption en", "suffix": "a cat on a sofa"}

    paligemma train --config jsonl:data=train.jsonl,validation=valid.jsonl --workdir DIR

Arguments are those of configs/base.py, which explains every setting.
"""

from ml_collections import ConfigDict

from paligemma_jax.training.checkpoints import Best
from paligemma_jax.training.config import load_config


def get_config(arg: str = "") -> ConfigDict:
    config = load_config(f"base:{arg}")
    with config.unlocked():
        if config.validation is not None:
            config.best = Best("validation_loss")
    return config
