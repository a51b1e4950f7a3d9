"""A small random model with the demo's vocabulary as a store, a picture, and the command itself."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.cli import main
from paligemma_jax.processing import ImagePreprocessing
from tests.tiny import GEMMA, random_model, tiny_config

TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "demo" / "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command returned and printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = pg.Tokenizer.from_file(TOKENIZER)
    config = tiny_config(GEMMA)
    llm = dataclasses.replace(config.llm, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, llm=llm)
    processor = pg.Processor(tokenizer, ImagePreprocessing(config.img.image_size))
    path = tmp_path_factory.mktemp("model") / "store"
    pg.Pipeline(random_model(config), processor).save(path)
    return path


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 100, 3), np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command in this process."""

    def call(*argv: object) -> Outcome:
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as e:
            code = int(e.code or 0)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list]]:
    """`says("one", "two")` replaces the model by one that gives these answers in turn.

    Returns the list that the prompts of each call are appended to.
    """

    def install(*texts: str) -> list[list]:
        calls: list[list] = []
        waiting = list(texts)

        class Canned:
            def generate(self, images: Sequence, prompts: Sequence[str], **options) -> list:
                calls.append(list(prompts))
                return [pg.Generation(waiting.pop(0), (5, 1), (-0.5, -0.25)) for _ in images]

        monkeypatch.setattr("paligemma_jax.cli.asking.load_pipeline", lambda args: Canned())
        monkeypatch.setattr("paligemma_jax.cli.demo.load_pipeline", lambda args: Canned())
        return calls

    return install
