"""Checkpoints in and out: big_vision npz, Hugging Face safetensors, and the native format."""

from paligemma_jax.weights.big_vision import BigVision as BigVision
from paligemma_jax.weights.checkpoint import Checkpoint as Checkpoint
from paligemma_jax.weights.checkpoint import CheckpointInfo as CheckpointInfo
from paligemma_jax.weights.checkpoint import describe as describe
from paligemma_jax.weights.checkpoint import open_checkpoint as open_checkpoint
from paligemma_jax.weights.convert import convert as convert
from paligemma_jax.weights.huggingface import HuggingFace as HuggingFace
from paligemma_jax.weights.load import load_params as load_params
from paligemma_jax.weights.store import Orbax as Orbax
