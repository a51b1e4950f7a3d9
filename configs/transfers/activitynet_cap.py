"""ActivityNet: captions of videos.

Arguments and hyperparameters are in table.py.
"""

from ml_collections import ConfigDict

from paligemma_jax.training.config import load_config


def get_config(arg: str = "") -> ConfigDict:
    return load_config(f"transfers/table:task=activitynet_cap,{arg}")
