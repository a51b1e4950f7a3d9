"""Compiled programs kept from one command to the next: most of a short command is compilation."""

import hashlib
import os
import platform
import sys
import warnings
from pathlib import Path


def keep_compiled_programs() -> None:
    """Has JAX keep them in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR says where.

    Must come before JAX is imported. JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = _cache_root() / "paligemma-jax" / _machine()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return  # a home that cannot be written to: every command compiles
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    # An entry that cannot be read or written costs time, not the answer.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")


def _cache_root() -> Path:
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")


def _machine() -> str:
    """One directory a processor type: programs for another one, in a shared home, could crash."""
    kind = [platform.node(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind += next(([line] for line in lines if line.startswith(("flags", "Features"))), [])
    except OSError:
        pass
    return hashlib.sha256("\n".join(kind).encode()).hexdigest()[:16]
