"""A small random model with the demo's vocabulary, an image, and the command itself."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.cli.main import main
from paligemma_jax.generation.config import GenerationConfig
from paligemma_jax.generation.token_statistics import TokenStatistics
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.processing.image import ImagePreprocessing
from tests.tiny import GEMMA, random_model, tiny_config

TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "demo" / "tokenizer.model"
SURE, UNSURE = 0.95, 0.4  # probability of every token that a scripted model says


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command returned and printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]
Says = Callable[..., list[list[str]]]


@pytest.fixture(scope="session")
def pipeline() -> pg.Pipeline:
    tokenizer = pg.Tokenizer.from_file(TOKENIZER)
    config = tiny_config(GEMMA)
    llm = dataclasses.replace(config.llm, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, llm=llm)
    processor = pg.Processor(tokenizer, ImagePreprocessing(config.img.image_size))
    codec = pg.MaskCodec(MaskVAE(MaskVAEConfig(embedding_dim=8), rngs=nnx.Rngs(0)))
    return pg.Pipeline(random_model(config), processor, codec)


@pytest.fixture(scope="session")
def store(pipeline: pg.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a mask codec."""
    path = tmp_path_factory.mktemp("model") / "store"
    pipeline.save(path)
    return path


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 100, 3), np.uint8)
    path = tmp_path_factory.mktemp("images") / "noise.png"
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
def says(monkeypatch: pytest.MonkeyPatch, pipeline: pg.Pipeline) -> Says:
    """`says("one", "two")` is a pipeline whose model gives these answers in turn.

    All that follows from them is the pipeline's own: statistics, parsing, scores, masks, drawings.
    The model is sure of what comes before a semicolon, and less so of the rest. Returns the list
    that the prompts of each call are appended to.
    """

    def install(*texts: str) -> list[list[str]]:
        calls: list[list[str]] = []
        waiting = list(texts)

        class Scripted(pg.Pipeline):
            def _generate(
                self, method: str, run: Any, images: Any, prompts: Any, config: Any,
                settings: Any, how: Any,
            ) -> list[Any]:  # fmt: skip
                calls.append(list(prompts))
                return super()._generate(method, run, images, prompts, config, settings, how)

            def _run(
                self, function: Any, chosen: Any, config: GenerationConfig, **more: Any
            ) -> Any:
                tokenizer, statistics = self.processor.tokenizer, config.token_statistics
                return [speak(tokenizer, waiting.pop(0), statistics) for _ in chosen.indices]

        scripted = Scripted(pipeline.model, pipeline.processor, pipeline.mask_codec)
        monkeypatch.setattr("paligemma_jax.loading.from_pretrained", lambda *_, **__: scripted)
        return calls

    return install


def speak(tokenizer: pg.Tokenizer, text: str, statistics: TokenStatistics | None) -> pg.Generation:
    """An answer as a model gives it whose probabilities are SURE or UNSURE."""
    sure = len(tokenizer.encode(text.split(";")[0]))
    tokens = np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int32)
    chosen = np.where(np.arange(tokens.size) < sure, SURE, UNSURE)[:, None]
    others = np.log((1 - chosen) / (tokenizer.vocab_size - 1))
    is_said = np.arange(tokenizer.vocab_size) == tokens[:, None]
    logprobs = np.where(is_said, np.log(chosen), others).astype(np.float32)
    extras = ()
    if statistics is not None:
        measured = np.asarray(statistics.measure(jnp.asarray(logprobs), jnp.asarray(tokens)))
        extras = tuple(map(tuple, measured.tolist()))
    said = tuple(logprobs[is_said].tolist())
    return pg.Generation(
        text=text,
        tokens=tuple(tokens.tolist()),
        logprobs=said,
        finish_reason="eos",
        extras=extras,
    )
