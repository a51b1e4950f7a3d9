"""The training loop on a tiny model: what it leaves behind, and that nothing stops it for good."""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import paligemma_jax as pg
from paligemma_jax.data.mixture import Mixture, MixtureComponent
from paligemma_jax.errors import CheckpointError, ConfigError, DatasetError
from paligemma_jax.models.lora import TRAINABLE, LoRA
from paligemma_jax.models.sharding import Axes
from paligemma_jax.training import trainer
from paligemma_jax.training.checkpoints import Best
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.logging import read_metrics
from paligemma_jax.training.optimizer import Epochs, Steps
from paligemma_jax.training.setup import set_up
from paligemma_jax.training.step import DivergedError
from paligemma_jax.training.trainer import FineTuneResult, train
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.convert import convert
from tests.training.runs import records, stored_weights, tiny_run

CODEC = Path(__file__).parents[2] / "checkpoints" / "demo" / "mask_codec.npz"


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every run compiles the same step; here it is read back from the disk instead."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # whether there is one was found out before
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


class Reports:
    """What stands for the module wandb, and remembers what it is told."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}
        self.rows: dict[int, dict[str, float]] = {}

    def init(self, **about: Any) -> "Reports":
        self.about = about
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows[step] = self.rows.get(step, {}) | values

    def finish(self) -> None:
        self.about["finished"] = True


@dataclasses.dataclass(frozen=True)
class Whole:
    """A run that nothing interrupted."""

    config: TrainConfig
    result: FineTuneResult
    reports: Reports


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    config = tiny_run(store, validation=records(5), evaluate_every=Steps(4), wandb="tiny")
    reports = Reports()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", reports)
        result = train(config, tmp_path_factory.mktemp("whole") / "run")
    return Whole(config, result, reports)


@pytest.fixture(scope="module")
def whole(run: Whole) -> Path:
    return run.result.workdir


def losses(workdir: Path) -> dict[int, float]:
    rows = read_metrics(workdir / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def weights(workdir: Path) -> Mapping[str, np.ndarray]:
    return stored_weights(workdir / "model")


def require_same_run(workdir: Path, whole: Path) -> None:
    assert losses(workdir) == losses(whole)
    mine, expected = weights(workdir), weights(whole)
    assert all(np.array_equal(mine[name], expected[name]) for name in expected)


class Killed(BaseException):
    """Stands for the end of the process."""


def at(step: int, act: Any) -> Any:
    def progress(now: int, total: int, values: Mapping[str, float]) -> None:
        if now == step:
            act()

    return progress


def kill() -> None:
    raise Killed


def test_run_leaves_a_model_numbers_pictures_and_a_report(run: Whole):
    result, workdir = run.result, run.result.workdir
    assert result.finished and result.step == 6 and result.model == workdir / "model"
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    checked = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert list(checked) == [0, 4, 6] and checked[6] < checked[0]
    assert result.metrics["validation_loss"] == checked[6]
    assert losses(workdir)[6] < losses(workdir)[1]
    assert {"samples_per_second", "tokens_per_second", "grad_norm"} <= rows[-2].keys()
    for name in ("samples.png", "loss.png", "report.html", "config.json"):
        assert (workdir / name).stat().st_size > 0
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == [
        ".lock", "step_000000004", "step_000000006",
    ]  # fmt: skip
    assert isinstance(result.load(dtype="float32"), pg.Pipeline)
    about = run.reports.about
    assert about["project"] == "tiny" and about["config"]["batch_size"] == "4"
    assert about["finished"] and run.reports.rows[6]["loss"] == losses(workdir)[6]


def test_finished_run_has_nothing_more_to_do(run: Whole, monkeypatch: pytest.MonkeyPatch):
    manifest = run.result.workdir / "model" / "MANIFEST.json"
    before = manifest.read_bytes()
    fresh = []

    def noting(*args: Any) -> Any:
        setup = set_up(*args)
        fresh.extend(jax.tree.leaves(dataclasses.replace(setup.state, frozen={})))
        return setup

    monkeypatch.setattr(trainer, "set_up", noting)
    assert train(dataclasses.replace(run.config, wandb=None), run.result.workdir).finished
    assert manifest.read_bytes() == before
    assert fresh and all(array.is_deleted() for array in fresh)  # not held beside the restored


def test_result_keeps_the_codec_and_the_origin_of_the_base(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    convert(store, tmp_path / "base", mask_codec=CODEC)
    origin = {"sliding_window": 4096, "generation_config": {"max_new_tokens": 7}}

    def opened(path: Path) -> Any:
        checkpoint = open_checkpoint(path)
        checkpoint.origin = origin | {"kind": "huggingface"}
        return checkpoint

    monkeypatch.setattr(trainer, "open_checkpoint", opened)
    codec = tmp_path / "base" / "mask_codec.npz"
    content = codec.read_bytes()
    config = tiny_run(tmp_path / "base", duration=Steps(1))
    result = train(config, tmp_path / "run", progress=at(1, codec.unlink))
    assert result.model is not None
    with open_checkpoint(result.model) as found:
        assert found.origin == origin | {"kind": "fine-tuned", "base": "base", "step": 1}
        assert found.mask_codec_bytes == content


@pytest.mark.parametrize(
    ("step", "number"),
    [(3, signal.SIGTERM), pytest.param(1, signal.SIGINT, marks=pytest.mark.slow)],
)
def test_killed_and_later_asked_to_stop_it_goes_on_as_if_nothing_had_happened(
    store: Path, whole: Path, tmp_path: Path, step: int, number: signal.Signals
):
    with pytest.raises(Killed):
        train(tiny_run(store), tmp_path, progress=at(step, kill))
    assert not (tmp_path / "model").exists()
    before = signal.getsignal(number)
    result = train(tiny_run(store), tmp_path, progress=at(4, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) is before
    assert not result.finished and result.model is None and 4 <= result.step < 6
    checkpoint = tmp_path / "checkpoints" / f"step_{result.step:09d}"
    # What later losses are compared with goes along.
    remembered = json.loads((checkpoint / "run.json").read_bytes())["info"]["losses"]
    assert remembered["recent"] == [losses(whole)[i + 1] for i in range(result.step)]
    assert f"stopped by {number.name}" in (tmp_path / "report.html").read_text()
    with pytest.raises(CheckpointError, match=f"stopped at step {result.step}"):
        result.load()
    with pytest.raises(ConfigError, match="learning_rate is 0.02, and was 0.01"):
        train(tiny_run(store, learning_rate=0.02), tmp_path)
    with pytest.raises(DatasetError, match="records"):
        train(tiny_run(store, train=records(13)), tmp_path)
    assert train(tiny_run(store), tmp_path).finished
    require_same_run(tmp_path, whole)


@pytest.mark.slow
def test_damaged_checkpoint_costs_the_steps_since_the_one_before(
    store: Path, whole: Path, tmp_path: Path
):
    with pytest.raises(Killed):
        train(tiny_run(store), tmp_path, progress=at(5, kill))
    (tmp_path / "checkpoints" / "step_000000004" / "arrays.json").write_text("")
    with pytest.warns(UserWarning, match="step 4 is damaged .* step 2 is used"):
        train(tiny_run(store), tmp_path)
    require_same_run(tmp_path, whole)


@pytest.mark.slow
def test_mixture_goes_on_where_it_was(store: Path, tmp_path: Path):
    made = records()
    for place in range(8):
        made[place]["id"] = f"first{place}"
    mixture = Mixture(
        MixtureComponent(made[:8], 3.0), MixtureComponent(made[8:], 1.0, transforms=())
    )
    held_out = Mixture(MixtureComponent(records(5)), MixtureComponent(made[:2]))
    mixed = tiny_run(store, train=mixture, validation=held_out, duration=Epochs(2))
    whole = train(mixed, tmp_path / "whole")
    assert whole.step == 6 and whole.metrics["validation_loss"] > 0  # 2 epochs of 12 by 4
    with pytest.raises(Killed):
        train(mixed, tmp_path / "killed", progress=at(5, kill))
    with pytest.raises(ConfigError, match="train is Mixture.MixtureComponent.list of 12, weight=1"):
        train(tiny_run(store, train=Mixture(MixtureComponent(made))), tmp_path / "killed")
    assert train(mixed, tmp_path / "killed").finished
    require_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_other_devices_may_go_on(store: Path, whole: Path, tmp_path: Path):
    with pytest.raises(Killed):
        train(tiny_run(store), tmp_path, progress=at(5, kill))
    assert train(tiny_run(store, mesh=Axes(data=2)), tmp_path).finished
    np.testing.assert_allclose(
        list(losses(tmp_path).values()), list(losses(whole).values()), rtol=1e-4
    )


@pytest.mark.slow
def test_loss_that_is_no_number_stops_the_run_with_the_ids(store: Path, tmp_path: Path):
    with pytest.raises(DivergedError, match="At step 2 the loss was"):
        train(tiny_run(store, learning_rate=1e30, max_grad_norm=None), tmp_path)
    (row,) = map(json.loads, (tmp_path / "bad_batches.jsonl").read_text().splitlines())
    assert row["step"] == 2 and len(row["ids"]) == 4 and row["ids"][0].startswith("r")


@pytest.mark.slow
def test_adapters_are_saved_alone_and_merged_and_the_best_state_is_the_result(
    store: Path, tmp_path: Path
):
    config = tiny_run(
        store,
        lora=LoRA(rank=2, targets="llm/layers/attn/.*"),
        learning_rate=3.0,  # gets worse, so that the best is not the last
        max_grad_norm=None,
        optimizer=pg.training.optimizer.SGD(),
        validation=records(3),
        samples=0,
        evaluate_every=Steps(2),
        best=Best("validation_loss"),
    )
    result = train(config, tmp_path)
    before = weights(tmp_path)
    after = stored_weights(store)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed and all(name.startswith("llm/layers/attn/") for name in changed)
    assert result.adapter is not None and (result.adapter / "adapter_config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_is_trained_beside_adapters_is_kept(quantize: str | None, store: Path, tmp_path: Path):
    head, scale = "img/head/kernel", "llm/final_norm/scale"
    lora = LoRA(rank=2, targets="llm/layers/attn/q_einsum")
    trainable = f"{TRAINABLE}|{head}|{scale}"
    config = tiny_run(store, lora=lora, trainable=trainable, quantize=quantize, samples=0)
    result = train(config, tmp_path)
    before = stored_weights(store)
    after = weights(tmp_path)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == {head, scale, "llm/layers/attn/q_einsum/w"}
    assert result.adapter is not None
    adapted = pg.from_pretrained(store, adapter=result.adapter, dtype="float32")
    merged = result.load(dtype="float32")
    image, words = records(1)[0]["image"], ["red", "green"]
    scores = [
        {answer.text: answer.logprob for answer in pali.score(image, "answer en colour?", words)}
        for pali in (adapted, merged)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.slow
def test_adapters_are_left_out_where_their_format_does_not_hold_all_that_was_trained(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    table = "llm/embedder/input_embedding"
    config = tiny_run(store, lora=LoRA(rank=2), trainable=f"{TRAINABLE}|{table}", samples=0)
    result = train(config, tmp_path)
    assert result.model is not None and result.adapter is None
    assert not (tmp_path / "adapter").exists()
    assert table in caplog.text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (dict(train=None), "train is not set"),
        (dict(batch_size=5), "multiple of 2 devices, got 5"),
        (dict(model="paligemma2-3b-pt-222"), "Did you mean"),
        (dict(trainable="llm/nonsense"), "match no parameter"),
        (dict(train=records(2)), "batch of 4|batch_size"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_compiles(
    store: Path, tmp_path: Path, changes: dict[str, Any], problem: str
):
    with pytest.raises(pg.PaliGemmaError, match=problem):
        train(tiny_run(store, **changes), tmp_path)
