"""Widget Captioning: what an element of a screen is for.

Arguments and hyperparameters are in table.py.
"""

from ml_collections import ConfigDict

from paligemma_jax.training.config import load_beside


def get_config(arg: str = "") -> ConfigDict:
    return load_beside(__file__, "table.py", f"task=widgetcap,{arg}")
