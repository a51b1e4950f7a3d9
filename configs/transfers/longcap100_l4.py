"""Longcap100 with plain gradient descent, for an L4 (big_vision's vertexai_l4).

Arguments and hyperparameters are in table.py.
"""

from ml_collections import ConfigDict

from paligemma_jax.training.config import load_config


def get_config(arg: str = "") -> ConfigDict:
    return load_config(f"transfers/table:task=longcap100_l4,{arg}")
