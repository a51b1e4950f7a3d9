"""Compiled programs kept from one process to the next: most of a short one is compilation."""

import hashlib
import platform
import warnings
from pathlib import Path

import jax

from paligemma_jax.user_cache import user_cache

_DIRECTORY = "jax_compilation_cache_dir"
_LEAST = "jax_persistent_cache_min_compile_time_secs"
_ENABLED = "jax_enable_compilation_cache"
_LEAST_BY_DEFAULT, _LEAST_HERE = 1.0, 0.0  # seconds that a kept program took to compile


def keep_compiled_programs() -> None:
    """Has JAX keep them in the user's cache directory, for all that this process compiles.

    Nothing changes where JAX knows a directory already (jax.config, JAX_COMPILATION_CACHE_DIR) or
    keeps nothing (JAX_ENABLE_COMPILATION_CACHE=false). Loading a model calls this.
    """
    if getattr(jax.config, _DIRECTORY) or not getattr(jax.config, _ENABLED):
        return
    directory = user_cache() / _machine()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written to: every process compiles
    jax.config.update(_DIRECTORY, str(directory))
    if getattr(jax.config, _LEAST) == _LEAST_BY_DEFAULT:
        jax.config.update(_LEAST, _LEAST_HERE)
    # An entry that cannot be read or written costs time, not the answer.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")


def _machine() -> str:
    """One directory a processor type: programs for another one, in a shared home, could crash."""
    kind = [platform.node(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind += next(([line] for line in lines if line.startswith(("flags", "Features"))), [])
    except OSError:
        pass
    return hashlib.sha256("\n".join(kind).encode()).hexdigest()[:16]
