"""On what and with what a run was made."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from paligemma_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")
_PROBE = "import jax; print(jax.default_backend(), jax.local_devices()[0].device_kind, sep='\\n')"


def describe_environment(accelerator: str | None) -> dict[str, str]:
    """Device, versions, date and load average, as short texts."""
    load = " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": accelerator or _processor(),
        "load average before": load,
        "paligemma-jax": __version__,
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
    }


def find_accelerator() -> str | None:
    """What JAX computes on by itself, None for a CPU.

    Asked in another process: this one would take the memory that the measuring ones need.
    """
    command = [sys.executable, "-c", _PROBE]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    return None if len(found) < 2 or found[0] == "cpu" else found[1]


def missing_peer() -> str | None:
    """The line that says that Hugging Face's implementation is not installed; else None."""
    if _version("torch") and _version("transformers"):
        return None
    return (
        "Hugging Face's implementation is not installed, so only this library is measured. "
        'Install it with: pip install "paligemma-jax[parity]"'
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"CPU, {name}, {cores} cores"
