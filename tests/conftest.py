"""Settings and small models for every test; the environment is set before jax is imported."""

import importlib.metadata
import os

import jax
import pytest

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.paligemma import PaliGemma
from tests.tiny import GEMMA2, random_model, tiny_config

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    _flags += " --xla_force_host_platform_device_count=2"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag not known is fatal
    _flags += " --xla_cpu_use_fusion_emitters=false"  # compiles in a third of the time
os.environ["XLA_FLAGS"] = _flags.strip()


jax.config.update("jax_default_matmul_precision", "highest")  # as the references were made
# Programs here run once or twice: compiling them well costs more than it saves.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_enable_compilation_cache", False)  # of this process; commands keep theirs


@pytest.fixture(scope="session", name="tiny_config")
def _tiny_config() -> PaliGemmaConfig:
    """PaliGemma 2 in miniature: every kind of layer, 4 patches, 64 pieces."""
    return tiny_config(GEMMA2)


@pytest.fixture(scope="session")
def tiny_model(tiny_config: PaliGemmaConfig) -> PaliGemma:
    """Random weights in float32 for `tiny_config`."""
    return random_model(tiny_config)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Every compiled program holds some memory maps; a process may have 65,530 on Linux."""
    yield
    jax.clear_caches()
