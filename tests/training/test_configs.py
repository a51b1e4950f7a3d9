"""Every configuration file: its hyperparameters, and steps of it on the tiny model."""

import dataclasses
import runpy
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from paligemma_jax.config import VARIANTS
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.sharding import Axes
from paligemma_jax.training.config import TrainConfig, load_config
from paligemma_jax.training.optimizer import SGD, Epochs, RunLength, Steps, make_optimizer
from paligemma_jax.training.step import init_state
from paligemma_jax.training.trainer import train
from paligemma_jax.weights.tensors import expected_shapes
from tests.tiny import tiny_config
from tests.training.runs import records, tiny_run

CONFIGS = Path(__file__).parents[2] / "configs"
TRANSFERS = runpy.run_path(str(CONFIGS / "transfers.py"))["TRANSFERS"]
OTHERS = ("transfers", "__init__")
NAMES = [path.stem for path in sorted(CONFIGS.glob("*.py")) if path.stem not in OTHERS]
NAMES += [f"transfers:task={task}" for task in TRANSFERS]


def test_every_configuration_that_is_offered_is_one_of_finetuning():
    with pytest.raises(ConfigError) as caught:
        load_config("nothing-like-it")
    offered = str(caught.value).partition("There are: ")[2].partition(";")[0].split(", ")
    for name in offered:
        read("transfers:task=vqav2" if name == "transfers" else name)
    assert {"base", "jsonl", "transfers"} <= {*offered}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("base:freeze=all", "freeze=vit or freeze=llm, got freeze=all"),
        ("multi_host:chips=z", "chips: expected int, got 'z'"),
        ("transfers:task=vqav2,freeze_vit=perhaps", "freeze_vit: expected bool, got 'perhaps'"),
    ],
)
def test_arguments_with_other_values_are_errors(spec: str, message: str):
    with pytest.raises(ConfigError, match=message):
        read(spec)


def test_transfers_freeze_the_image_encoder_as_asked_or_as_the_table_says():
    def trainable(arg: str) -> str | None:
        return read(f"transfers:task={arg}").trainable

    assert trainable("vqav2,freeze_vit") == trainable("vqav2,freeze_vit=True") == "llm/.*"
    assert trainable("vqav2") is None and trainable("science_qa") == "llm/.*"
    assert trainable("science_qa,freeze_vit=False") is None


def read(spec: object) -> TrainConfig:
    return TrainConfig.from_config(load_config(f"{spec}"))


@pytest.mark.parametrize("name", NAMES)
def test_file_is_read_and_its_optimizer_fits_the_model(name: str):
    config = read(name)
    assert config.model in VARIANTS
    shapes = expected_shapes(tiny_config())
    arrays = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    if config.lora is not None:
        arrays = {f"{name}/lora_a": leaf for name, leaf in arrays.items()} | arrays
    optimizer = make_optimizer(config.optimizer_config, arrays, RunLength(total_steps=100))
    trained = config.optimizer_config.trainable(arrays)
    state = jax.eval_shape(lambda arrays: init_state(arrays, trained, optimizer), arrays)
    assert set(state.trainable) == set(trained) and trained


@pytest.mark.parametrize("name", sorted(name for name in VARIANTS if "-pt-" in name))
def test_every_published_size_and_resolution_is_reached(name: str):
    version = 2 if name.startswith("paligemma2") else 1
    size, _, resolution = name.split("-")[1:]
    spec = f"{CONFIGS / 'base.py'}:version={version},size={size},resolution={resolution}"
    assert read(spec).model == name


def test_hyperparameters_are_the_published_ones():
    def transfer(arg: str) -> TrainConfig:
        name, _, rest = arg.partition(":")
        return read(f"transfers:task={name},{rest}")

    vqa = transfer("vqav2:resolution=448,final_split=True")
    assert (vqa.model, vqa.learning_rate, vqa.weight_decay) == ("paligemma-3b-pt-448", 1e-5, 0.0)
    assert (vqa.text_length, vqa.batch_size, vqa.duration) == (32, 256, Epochs(10))
    assert vqa.train.split == "train+validation"
    small = transfer("tallyqa:resolution=896,version=2,size=10b")
    assert (small.model, small.learning_rate) == ("paligemma2-10b-pt-896", 7e-6)
    assert transfer("gqa:resolution=448").trainable == "llm/.*"
    assert transfer("gqa:resolution=448,freeze_vit=False").trainable is None
    segmentation = transfer("refcoco_seg"), transfer("refcoco_seg:resolution=448")
    assert [(one.label_smoothing, one.dropout) for one in segmentation] == [(0.3, 0.1), (0.3, 0.0)]
    assert [one.split for one in transfer("coco35l").train][:2] == ["train_ar", "train_bn"]
    assert len(transfer("chartqa:resolution=896").train) == 2
    assert transfer("longcap100_l4").optimizer == SGD()
    t4 = read(CONFIGS / "attention_only_t4.py")
    assert (t4.learning_rate, t4.total_steps(90), t4.dtype) == (0.03, 64, "float16")
    with pytest.raises(ConfigError, match="argument 'reso'. Did you mean resolution"):
        transfer("vqav2:reso=448")
    with pytest.raises(ConfigError, match="no transfer 'vqa'"):
        read("transfers:task=vqa")


def on_the_tiny_model(config: TrainConfig, store: Path) -> TrainConfig:
    """The same recipe with the shapes that all tests share."""
    tiny = tiny_run(store)
    shared = ("model", "train", "text_length", "dtype", "log_every", "tensorboard")
    changes: dict[str, Any] = {name: getattr(tiny, name) for name in shared}
    mesh = Axes(data=-1) if config.mesh.data == -1 else config.mesh
    return dataclasses.replace(
        config,
        **changes,
        batch_size=4,
        duration=Steps(2),
        validation=None,
        best=None,
        mesh=mesh,
        workers=0,
        gradient_accumulation_steps=min(config.gradient_accumulation_steps, 2),
    )


def require_steps(name: str, store: Path, workdir: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        result = train(on_the_tiny_model(read(name), store), workdir)
    assert result.finished and np.isfinite(result.metrics["loss"])
    assert len(records()) > 4


def recipes() -> list[str]:
    """One file of each different kind of program."""
    found: dict[str, str] = {}
    for name in NAMES:
        config = read(name)
        kind = (config.trainable, config.lora, config.quantize, config.optimizer, config.mesh)
        step = (config.label_smoothing > 0, config.dropout > 0, config.gradient_accumulation_steps)
        found.setdefault(repr((*kind, *step)), name)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes())
def test_every_kind_of_step_on_the_tiny_model(name: str, store: Path, tmp_path: Path):
    require_steps(name, store, tmp_path)
