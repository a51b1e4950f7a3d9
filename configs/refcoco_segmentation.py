"""Referring expression segmentation, as PaliGemma on RefCOCO.

    paligemma train --config refcoco_segmentation:data=DIR --workdir DIR

`data` is in the COCO layout, whose masks become <seg> tokens by the checkpoint's mask codec; or
JSON lines with such tokens: {"image": ..., "prefix": "segment left cat", "suffix": "<loc....".
Hyperparameters are big_vision's for this task; transfers.py has its data set too.
"""

import dataclasses

from ml_collections import ConfigDict

from paligemma_jax.data.transforms import ShuffleBoxes
from paligemma_jax.training.config import load_config
from paligemma_jax.training.optimizer import Epochs


def get_config(arg: str = "") -> ConfigDict:
    config = load_config(f"base:{arg}")
    with config.unlocked():
        if config.train is not None and not config.train.path.endswith(".jsonl"):
            config.train = dataclasses.replace(config.train, masks=True)
        if config.validation is not None and not config.validation.path.endswith(".jsonl"):
            config.validation = dataclasses.replace(config.validation, masks=True)
        config.transforms = (ShuffleBoxes(shuffle_labels=True),)
        config.text_length = 128  # a mask and its box take 20 tokens
        config.batch_size = 64
        config.duration = Epochs(100)
        config.weight_decay = 0.0
        config.label_smoothing = 0.3
    return config
