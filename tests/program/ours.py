"""This project's programs at real sizes: shapes in place of weights, bfloat16 throughout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.generation import decode as loop
from paligemma_jax.models.inference_layout import abstract_unstacked
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization import abstract_quantized
from paligemma_jax.models.quantization_config import Quantization, QuantizedFormat
from paligemma_jax.models.quantized_matrix import quantize_matrix
from paligemma_jax.models.sharding import Axes
from paligemma_jax.training.memory_plan import RUN, BatchShape, StepShapes
from paligemma_jax.training.optimizer import OptimizerConfig, make_optimizer
from paligemma_jax.training.step import StepConfig, TrainState, TrainStep
from tests.program.target import Compiled, Target, as_on_a_gpu

CACHE_LENGTH = 512  # 256 image tokens, a prompt, new tokens
PROMPT = 32
CAPACITY = 128


def variant(name: str, *, layers: int | None = None) -> PaliGemmaConfig:
    """A published model; with `layers` that many in encoder and decoder, each of its real size."""
    config = VARIANTS[name]
    if layers is None:
        return config
    return dataclasses.replace(
        config,
        img=dataclasses.replace(config.img, depth=layers),
        llm=dataclasses.replace(config.llm, depth=layers),
    )


def model_of(config: PaliGemmaConfig, quantization: Quantization | None = None) -> PaliGemma:
    """As `from_pretrained` lays it out, of shapes; `quantization` says how it is quantized."""
    model = abstract_unstacked(config, jnp.bfloat16, jnp.bfloat16)
    if quantization is None:
        return model
    with as_on_a_gpu():
        return abstract_quantized(model, quantization)


def cache_of(config: PaliGemmaConfig, batch: int, slots: int) -> Any:
    """Shapes of an empty cache."""
    model = model_of(config)
    return jax.eval_shape(lambda: model.llm.empty_cache(batch, slots))


def cache_length_for(config: PaliGemmaConfig) -> int:
    """Cache length for one image, prompt and new tokens: a multiple of 256."""
    return -(-(config.img.num_patches + PROMPT + CAPACITY) // 256) * 256


def decode(
    target: Target, config: PaliGemmaConfig, batch: int, quantization: Quantization | None = None
) -> Compiled:
    """The greedy decoding loop."""
    logits = _shape((batch, config.llm.vocab_size), jnp.float32)
    plan = jax.eval_shape(lambda: loop.DecodePlan.greedy(batch, CAPACITY))
    started = jax.eval_shape(
        lambda plan, logits, mask: loop.start_progress(plan, logits, mask, CAPACITY),
        plan,
        logits,
        _shape((batch,), jnp.bool_),
    )
    return target.compile(
        loop.decode_steps,
        model_of(config, quantization),
        plan,
        started,
        cache_of(config, batch, CACHE_LENGTH),
        _shape((), jnp.int32),
    )


def prefill(
    target: Target, config: PaliGemmaConfig, batch: int, quantization: Quantization | None = None
) -> Compiled:
    """Image encoder, prompt and image through the decoder, logits of the last position."""
    size = config.img.image_size
    text = _shape((batch, PROMPT), jnp.int32)
    return target.compile(
        loop.prefill,
        model_of(config, quantization),
        _shape((batch, 1, size, size, 3), jnp.float32),
        text,
        text,
        _shape((batch, PROMPT), jnp.bool_),
        slots=cache_length_for(config),
    )


def encode(
    target: Target, config: PaliGemmaConfig, batch: int, quantization: Quantization | None = None
) -> Compiled:
    """The image encoder by itself."""
    size = config.img.image_size
    images = _shape((batch, 1, size, size, 3), jnp.float32)
    return target.compile(
        Jitted(lambda model, images: model.encode_images(images)),
        model_of(config, quantization),
        images,
    )


def train_step(
    target: Target,
    model: PaliGemma,
    optimizer: OptimizerConfig,
    step: StepConfig,
    shape: BatchShape,
) -> tuple[Compiled, TrainState]:
    """A step of a model of shapes, and the shapes of its state."""
    given = StepShapes.of(model, optimizer, step, shape, Axes(), jnp.float32)
    made = make_optimizer(optimizer, given.graphdef.paths, RUN)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step_of = TrainStep(given.graphdef, made, step)
    return target.compile(step_of, given.state, given.batch, key), given.state


def quantized_product(
    target: Target, format: QuantizedFormat, matrix: tuple[int, int], rows: int
) -> Compiled:
    """`rows` rows by a quantized matrix [out, in]."""
    with as_on_a_gpu():
        stored = jax.eval_shape(lambda w: quantize_matrix(w, format), _shape(matrix, jnp.bfloat16))
    x = _shape((rows, matrix[1]), jnp.bfloat16)
    return target.compile(Jitted(lambda stored, x: stored.matmul(x)), stored, x)


def _shape(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)
