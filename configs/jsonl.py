"""Fine-tunes on one's own pictures with prompts and answers; copy this file and change it.

    {"image": "cat.jpg", "prefix": "caption en", "suffix": "a cat on a sofa"}

    paligemma train --config configs/jsonl.py:data=train.jsonl,validation=valid.jsonl --workdir DIR

Arguments are those of configs/base.py, which explains every setting.
"""

from ml_collections import ConfigDict

from paligemma_jax.training.checkpoints import Best
from paligemma_jax.training.config import load_beside


def get_config(arg: str = "") -> ConfigDict:
    config = load_beside(__file__, "base.py", arg)
    with config.unlocked():
        if config.validation is not None:
            config.best = Best("validation_loss")
    return config
