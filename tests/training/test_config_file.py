"""Configuration files, their arguments, and settings on the command line."""

from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.lora import LoRA
from paligemma_jax.training.config import TrainConfig, load_config, override, parse_arg
from paligemma_jax.training.optimizer import SGD, Cosine, Epochs, Share, Steps
from paligemma_jax.training.step import SkipBadLoss, StopAtBadLoss


def changed(*overrides: str) -> TrainConfig:
    config = TrainConfig().to_config()
    override(config, overrides)
    return TrainConfig.from_config(config)


def test_settings_change_numbers_fields_of_objects_and_whole_objects():
    config = changed(
        "learning_rate=1",
        "batch_size=8",
        "model=paligemma2-3b-pt-224",
        "resolution=448",
        "step.label_smoothing=0.3",
        "schedule=Cosine(warmup=Share(0.1), cooldown=Steps(5))",
        "schedule.warmup=Share(0.2)",
        "duration=Epochs(3)",
        "method=SGD(momentum=0.9)",
        "lora=LoRA(rank=4, targets='llm/.*')",
        "clip_norm=None",
        "bad_loss=SkipBadLoss(2)",
        "bad_loss.factor=5",
    )
    assert (config.learning_rate, config.batch_size, config.resolution) == (1.0, 8, 448)
    assert config.model == "paligemma2-3b-pt-224" and config.clip_norm is None
    assert config.step.label_smoothing == 0.3 and config.duration == Epochs(3)
    assert config.schedule == Cosine(warmup=Share(0.2), cooldown=Steps(5))
    assert config.method == SGD(momentum=0.9) and config.lora == LoRA(rank=4, targets="llm/.*")
    assert config.bad_loss == SkipBadLoss(2, factor=5.0)


def test_all_that_does_not_fit_is_listed_with_the_nearest_names():
    wrong = {
        "learningrate=1": "Did you mean learning_rate?",
        "step.label_smoothin=0.1": "Did you mean label_smoothing?",
        "batch_size=many": "'many' is text; a whole number such as 32 fits",
        "batch_size=2.5": "2.5 is a number; a whole number such as 32 fits",
        "duration=5": "5 is a whole number; a Epochs such as Epochs",
        "duration=Epoch(5)": "Epoch is unknown. Did you mean Epochs?",
        "duration=Epochs(cout=5)": "Epochs(...) does not fit",
        "duration=exit()": "exit is unknown",
        "duration=Epochs(open('x'))": "open is unknown",
        "seed.x=1": "seed is 0, which has no fields",
        "seed": "it has no value",
    }
    with pytest.raises(ConfigError) as caught:
        override(TrainConfig().to_config(), wrong)
    message = str(caught.value)
    assert message.startswith(f"{len(wrong)} of the settings")
    for line, problem in zip(message.splitlines()[1:], wrong.values(), strict=False):
        assert problem in line


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(learning_rate=-1.0, batch_size=0), "learning_rate is -1.0(.|\n)*"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(quantize="int8"), "quantize is given without lora"),
        (dict(dtype="int8"), "int8 cannot be loaded"),
        (dict(nonsense=1), "unknown settings: nonsense"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        TrainConfig.from_config(ConfigDict(changes))


def test_duration_must_be_a_step_at_least():
    assert TrainConfig(duration=Epochs(2), batch_size=4).total_steps(10) == 5
    with pytest.raises(ConfigError, match="is 0 steps"):
        TrainConfig(duration=Steps(0)).total_steps(10)


FILE = """
from paligemma_jax.training.choices import StopAtBadLoss
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.config import parse_arg

def get_config(arg: str = ""):
    args = parse_arg(arg, size="3b", resolution=224, freeze=False)
    name = f"paligemma2-{args.size}-pt-{args.resolution}"
    return TrainConfig(model=name, bad_loss=StopAtBadLoss(2.0)).to_config()
"""


def test_file_with_argument_and_overrides(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    config = TrainConfig.from_config(load_config(f"{path}:size=10b,resolution=448", ["seed=3"]))
    assert (config.model, config.seed) == ("paligemma2-10b-pt-448", 3)
    assert config.bad_loss == StopAtBadLoss(2.0)
    with pytest.raises(ConfigError, match="'resolutoin' is unknown. Did you mean resolution"):
        load_config(f"{path}:resolutoin=448")
    path.write_text("x = 1")
    with pytest.raises(ConfigError, match="no function get_config"):
        load_config(path)


def test_configs_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for spec in ("jsonl:data=DIR", "jsonl.py:data=DIR", "transfers:task=vqav2,data=DIR"):
        assert TrainConfig.from_config(load_config(spec)).train.path == "DIR"
    with pytest.raises(ConfigError, match="'jsnl'. Did you mean jsonl.* There are: .*lora_24gb"):
        load_config("jsnl:data=DIR")
    assert load_config("jsonl.py").train is None
    Path("jsonl.py").write_text(FILE)  # a bare name is the shipped one, a path the user's
    assert load_config("jsonl").model != load_config("./jsonl.py:size=10b").model
    Path("mine.py").write_text(FILE)
    assert load_config("mine:size=10b").model == "paligemma2-10b-pt-224"


def test_argument_of_a_file():
    args = parse_arg("size=448,freeze", size="3b", freeze=False, rate=1.0)
    assert (args["size"], args["freeze"], args["rate"]) == ("448", True, 1.0)
    with pytest.raises(ConfigError, match="'two' is text; a whole number such as 1"):
        parse_arg("number=two", number=1)
