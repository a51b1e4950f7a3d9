"""What this process computes on: the one place that asks."""

import jax


def name() -> str:
    """JAX's name of the devices: "cpu", "gpu" or "tpu"; tests of programs put another here."""
    return jax.default_backend()


def on_cpu() -> bool:
    """Whether programs are for a CPU, where XLA has other forms that are fast."""
    return name() == "cpu"
