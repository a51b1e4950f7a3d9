"""Configurations, their arguments, settings on the command line, and the records they name."""

from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

import paligemma_jax as pg
from paligemma_jax.data.mixture import Mixture, MixtureComponent
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.lora import LoRA
from paligemma_jax.training.config import (
    Data,
    TrainConfig,
    first_records,
    load_config,
    open_records,
    override,
    parse_arg,
)
from paligemma_jax.training.optimizer import SGD, Cosine, Epochs, Fraction, Steps
from tests.training.runs import records


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
        "label_smoothing=0.3",
        "schedule=Cosine(warmup=Fraction(0.1), cooldown=Steps(5))",
        "schedule.warmup=Fraction(0.2)",
        "duration=Epochs(3)",
        "optimizer=SGD(momentum=0.9)",
        "lora=LoRA(rank=4, targets='llm/.*')",
        "max_grad_norm=None",
        "max_skipped_steps=2",
        "loss_spike_factor=5",
    )
    assert (config.learning_rate, config.batch_size, config.resolution) == (1.0, 8, 448)
    assert config.model == "paligemma2-3b-pt-224" and config.max_grad_norm is None
    assert config.label_smoothing == 0.3 and config.duration == Epochs(3)
    assert config.schedule == Cosine(warmup=Fraction(0.2), cooldown=Steps(5))
    assert config.optimizer == SGD(momentum=0.9) and config.lora == LoRA(rank=4, targets="llm/.*")
    assert (config.max_skipped_steps, config.loss_spike_factor) == (2, 5)
    assert config.step_config.skip_nonfinite and not TrainConfig().step_config.skip_nonfinite


def test_all_wrong_overrides_are_listed_with_the_nearest_names():
    wrong = {
        "learningrate=1": "Did you mean learning_rate?",
        "schedule.warmpu=0.1": "Did you mean warmup?",
        "batch_size=many": "expected int, got 'many'",
        "batch_size=2.5": "expected int, got 2.5",
        "optimizer=adamw": "expected Optimizer, got 'adamw'",
        "duration=5": "expected Steps or Fraction or Examples or Epochs, got 5",
        "duration=Epoch(5)": "Epoch is unknown. Did you mean Epochs?",
        "duration=Epochs(cout=5)": "Epochs(...) cannot be made",
        "duration=exit()": "exit is unknown",
        "duration=Epochs(open('x'))": "open is unknown",
        "seed.x=1": "seed is 0, which has no fields",
        "seed": "expected a value",
    }
    with pytest.raises(ConfigError) as caught:
        override(TrainConfig().to_config(), wrong)
    message = str(caught.value)
    assert message.startswith(f"{len(wrong)} settings")
    for line, problem in zip(message.splitlines()[1:], wrong.values(), strict=True):
        assert problem in line


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (dict(learning_rate=float("nan")), "learning_rate: .* got nan"),
        (
            dict(learning_rate=-1.0, batch_size=0),
            "settings .2.: .*batch_size.*learning_rate: .*-1.0",
        ),
        (dict(gradient_accumulation_steps=3), "divisor of batch_size=32, got 3"),
        (dict(dropout=1.0), "dropout in"),
        (dict(max_bad_fraction=5.0), "max_bad_fraction: .* below 1, got 5.0"),
        (dict(evaluate_batches=0), "evaluate_batches: .* at least 1"),
        (dict(loss_spike_factor=1.0), "loss_spike_factor: .* above 1"),
        (dict(loss_spike_factor=float("nan")), "loss_spike_factor: .* above 1"),
        (dict(quantize="int8"), "add lora"),
        (dict(dtype="int8"), "int8 cannot be loaded"),
        (dict(learnin_rate=1), "unknown settings: learnin_rate. Did you mean learning_rate"),
    ],
)
def test_invalid_settings(changes: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        TrainConfig.from_config(ConfigDict(changes))


def test_finetune_names_the_nearest_setting(tmp_path: Path):
    with pytest.raises(
        ConfigError, match="unknown settings: learning_rat. Did you mean learning_rate"
    ):
        pg.finetune("demo", [], tmp_path, learning_rat=1.0)


def test_duration_must_be_a_step_at_least():
    assert TrainConfig(duration=Epochs(2), batch_size=4).total_steps(10) == 5
    with pytest.raises(ConfigError, match="which is 0"):
        TrainConfig(duration=Steps(0)).total_steps(10)


FILE = """
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.config import parse_arg

def get_config(arg: str = ""):
    args = parse_arg(arg, size="3b", resolution=224, freeze=False)
    name = f"paligemma2-{args.size}-pt-{args.resolution}"
    return TrainConfig(model=name, loss_spike_factor=2.0).to_config()
"""


def test_file_with_argument_and_overrides(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    config = TrainConfig.from_config(load_config(f"{path}:size=10b,resolution=448", ["seed=3"]))
    assert (config.model, config.seed) == ("paligemma2-10b-pt-448", 3)
    assert config.loss_spike_factor == 2.0
    with pytest.raises(ConfigError, match="argument 'resolutoin'. Did you mean resolution"):
        load_config(f"{path}:resolutoin=448")
    path.write_text("x = 1")
    with pytest.raises(ConfigError, match="no such function"):
        load_config(path)


def test_configs_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for spec in ("jsonl:data=DIR", "transfers:task=vqav2,data=DIR"):
        assert TrainConfig.from_config(load_config(spec)).train.path == "DIR"
    with pytest.raises(ConfigError, match="'jsnl'. Did you mean jsonl.* There are: .*lora_24gb"):
        load_config("jsnl:data=DIR")
    for path in ("jsonl.py", "jsonl.py:data=DIR", "./jsonl:data=DIR"):
        with pytest.raises(ConfigError, match="There is no configuration"):
            load_config(path)
    Path("jsonl.py").write_text(FILE)  # a bare name is the shipped one, a path the user's
    assert load_config("jsonl:size=10b").loss_spike_factor is None
    for path in ("jsonl.py", "./jsonl.py", "./jsonl", str(tmp_path / "jsonl.py")):
        assert load_config(f"{path}:size=10b").loss_spike_factor == 2.0
    assert load_config("jsonl.py").loss_spike_factor == 2.0
    Path("mine.py").write_text(FILE)
    assert load_config("mine:size=10b").model == "paligemma2-10b-pt-224"


def test_argument_of_a_file():
    args = parse_arg("size=448,freeze", size="3b", freeze=False, rate=1.0)
    assert (args["size"], args["freeze"], args["rate"]) == ("448", True, 1.0)
    with pytest.raises(ConfigError, match="number: expected int, got 'two'"):
        parse_arg("number=two", number=1)


def test_parts_of_a_mixture_are_opened_and_looked_at_by_weight():
    rows = records(9)
    given = Mixture(
        MixtureComponent(rows[:5], 2.0),
        MixtureComponent((SequenceSource(rows[5:7]), rows[7:])),
    )
    found = open_records(given, "train")
    assert isinstance(found, pg.Mixture) and len(found) == 9
    assert [found[i].id for i in (0, 5, 8)] == ["r0", "r5", "r8"]
    assert [one.id for one in first_records(found, 6)] == ["r0", "r1", "r5", "r2", "r3", "r6"]
    assert [one.id for one in first_records(found.sources[0], 2)] == ["r0", "r1"]


def test_tuple_of_sources_is_joined():
    rows = records(4)
    found = open_records((SequenceSource(rows[:1]), SequenceSource(rows[1:])), "train")
    assert [found[i].id for i in range(4)] == ["r0", "r1", "r2", "r3"]
    assert len(open_records(tuple(rows), "train")) == 4


def test_mixture_on_the_command_line():
    text = "Mixture(MixtureComponent('a.jsonl', 3), "
    text += "MixtureComponent(Data('b', 'test'), transforms=(LowerCase(),)))"
    for before in (None, "x.jsonl", Data("x"), [{}]):
        config = TrainConfig(train=before).to_config()
        override(config, [f"train={text}"])
        mixture = TrainConfig.from_config(config).train
        assert [part.weight for part in mixture.components] == [3, 1.0]
        assert mixture.components[0].records == "a.jsonl"
        assert mixture.components[1].records == Data("b", "test")
        assert eval(repr(mixture), vars(pg.data) | {"Data": Data}) == mixture


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "train is not set"),
        (MixtureComponent("x"), "train is a part of a mixture"),
        ((Mixture(MixtureComponent("x")), "y"), "train is a tuple with a mixture"),
        (
            Mixture(MixtureComponent((MixtureComponent("x"), "y"))),
            r"train.0. is a tuple with a",
        ),
        (
            Mixture(MixtureComponent([{}]), MixtureComponent(None)),
            r"train\[1\] is not set",
        ),
    ],
)
def test_what_is_no_source(given: object, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        open_records(given, "train")
