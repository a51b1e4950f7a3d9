"""Training with this library and with transformers and torch: the same losses, step for step.

Needs torch and transformers, which nothing else here needs: pytest -m parity
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models.paligemma import from_params, split_model
from paligemma_jax.models.sharding import Rules
from paligemma_jax.processing.processor import Batch
from paligemma_jax.training.optimizer import (
    Cosine,
    Fraction,
    OptimizerConfig,
    RunLength,
    make_optimizer,
)
from paligemma_jax.training.step import StepConfig, TrainStep, init_state
from paligemma_jax.weights.load import load_params

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


GOLDEN = Path(__file__).parents[1] / "golden" / "huggingface"
ROWS, PREFIX, SUFFIX, STEPS, RATE, SMOOTHING = 4, 6, 6, 20, 2e-4, 0.1


def batches(config):
    """Images, tokens and what is supervised, of every step; answers differ in length.

    Two batches take turns, so that there is something to learn.
    """
    size = config["vision_config"].get("image_size", 224)
    for step in range(STEPS):
        rng = np.random.default_rng(step % 2)
        images = rng.uniform(-1, 1, (ROWS, size, size, 3)).astype(np.float32)
        tokens = rng.integers(4, config["_vocab_size"], (ROWS, PREFIX + SUFFIX)).astype(np.int32)
        ends = PREFIX + rng.integers(1, SUFFIX + 1, (ROWS, 1))
        place = np.arange(PREFIX + SUFFIX)[None]
        yield images, tokens, ((place >= PREFIX) & (place < ends)).astype(np.int32)


def ours(directory, config):
    settings, params = load_params(directory)
    graphdef, arrays = split_model(from_params(settings, params, jnp.float32))
    optimizer_config = OptimizerConfig(
        learning_rate=RATE,
        schedules=Rules(((".*", Cosine(warmup=Fraction(0.1))),)),
        max_grad_norm=1.0,
    )
    optimizer = make_optimizer(optimizer_config, arrays, RunLength(total_steps=STEPS))
    state = init_state(arrays, tuple(arrays), optimizer)
    step = TrainStep(graphdef, optimizer, StepConfig(label_smoothing=SMOOTHING))
    mask_ar = np.broadcast_to(np.arange(PREFIX + SUFFIX)[None] >= PREFIX, (ROWS, PREFIX + SUFFIX))
    losses = []
    for images, tokens, mask_loss in batches(config):
        ones = np.ones(tokens.shape, bool)
        batch = Batch(images[:, None], tokens, mask_ar.astype(np.int32), ones, mask_loss)
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return losses


def theirs(directory, config):
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    patches = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    rows, losses = config["_vocab_size"], []
    for step, (images, tokens, mask_loss) in enumerate(batches(config)):
        image_ids = np.full((ROWS, patches), config["image_token_index"])
        ids = torch.tensor(np.concatenate([image_ids, tokens[:, :-1]], 1), dtype=torch.long)
        types = torch.zeros_like(ids)
        types[:, -SUFFIX + 1 :] = 1
        logits = model(
            input_ids=ids,
            pixel_values=torch.tensor(np.moveaxis(images, -1, 1)),
            token_type_ids=types,
            attention_mask=torch.ones_like(ids),
        ).logits[:, patches:, :rows]
        logp = torch.log_softmax(logits, -1)
        wanted = torch.full(logits.shape, SMOOTHING / (rows - 1))
        wanted.scatter_(-1, torch.tensor(tokens[:, 1:, None], dtype=torch.long), 1 - SMOOTHING)
        mask = torch.tensor(mask_loss[:, 1:])
        loss = (-(wanted * logp).sum(-1) * mask).sum(1).div(mask.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        for gradient in gradients:
            gradient *= min(1.0, 1.0 / norm)
        progress = max(0.0, (step - 2) / (STEPS - 2))
        warmup = min(1.0, step / 2)
        optimizer.param_groups[0]["lr"] = RATE * warmup * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", ["pg1", "pg2"])
def test_twenty_steps(name, tmp_path):
    directory = GOLDEN / name / "hub_old"
    config = json.loads((directory / "config.json").read_text())
    expected = theirs(directory, config)
    np.testing.assert_allclose(ours(directory, config), expected, rtol=1e-4)
    assert expected[-1] < 0.8 * expected[1]
