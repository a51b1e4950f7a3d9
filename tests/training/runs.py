"""A tiny model as a checkpoint, and records to train it on."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import paligemma_jax as pg
from paligemma_jax.models.paligemma import flatten
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.training.config import TrainConfig
from paligemma_jax.training.optimizer import Constant, Steps
from paligemma_jax.weights.load import load_params
from tests.tiny import GEMMA, random_model, tiny_config

TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "demo" / "tokenizer.model"
SIZE = 8  # pixels a side


def write_tiny_store(path: Path) -> Path:
    """Random float32 weights, of a layer each, with the demo's vocabulary."""
    tokenizer = pg.Tokenizer.from_file(TOKENIZER)
    config = tiny_config(GEMMA, depth=1, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, img=dataclasses.replace(config.img, depth=1))
    processor = pg.Processor(tokenizer, ImagePreprocessing(config.img.image_size))
    pg.Pipeline(random_model(config), processor).save(path)
    return path


def stored_weights(path: Path) -> dict[str, np.ndarray]:
    """Every weight of a checkpoint by its path."""
    return {name: np.asarray(leaf) for name, leaf in flatten(load_params(path)[1]).items()}


def records(count: int = 12) -> list[dict[str, Any]]:
    """Noise, each with a color to say."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (count, SIZE, SIZE, 3), np.uint8)
    words = ["red", "green", "blue"]
    return [
        {"image": pixels[i], "prefix": "answer en colour?", "suffix": words[i % 3], "id": f"r{i}"}
        for i in range(count)
    ]


def tiny_run(store: Path, **changes: Any) -> TrainConfig:
    """Six steps of four rows in float32; the same shapes in every test."""
    values: dict[str, Any] = dict(
        model=str(store),
        train=records(),
        text_length=16,
        batch_size=4,
        duration=Steps(6),
        learning_rate=1e-2,
        schedule=Constant(),
        dtype="float32",
        log_every=Steps(1),
        evaluate_every=Steps(3),
        checkpoint_every=Steps(2),
        samples=2,
        sample_max_new_tokens=4,
        tensorboard=False,
    )
    return TrainConfig(**{**values, **changes})
