"""Fine-tuning from Python in one call."""

from pathlib import Path

import pytest

import paligemma_jax as pg
from paligemma_jax.errors import ConfigError
from paligemma_jax.training.trainer import finetune


def test_settings_that_do_not_exist_are_named_with_the_nearest(tmp_path: Path):
    with pytest.raises(ConfigError, match="no setting 'learning_rat'. Did you mean learning_rate"):
        finetune("demo", [], tmp_path, learning_rat=1.0)
    with pytest.raises(ConfigError, match="learning_rate is -1.0"):
        pg.finetune("demo", [], tmp_path, learning_rate=-1.0)
