"""How many programs JAX makes, which ones, and how long that takes."""

import collections

import jax
import jax.monitoring
import jax.numpy as jnp

_MADE = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts from when it is made until `stop`.

    A program that comes from the persistent cache counts as well: it was asked for. So do the small
    ones that JAX makes of single operators when arrays are made or converted.

    Attributes:
      counts: by the name of the function.
      seconds: in all.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0
        self._on = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def stop(self) -> "Compilations":
        """Stops counting, and returns itself."""
        self._on = False
        return self

    @property
    def own(self) -> dict[str, int]:
        """The counts without JAX's single operators, and its `stage`, which moves inputs."""
        operators = {*dir(jax.lax), *dir(jnp), "stage"}
        return {name: n for name, n in self.counts.items() if name not in operators}

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if self._on and event == _MADE:
            name = str(kwargs.get("fun_name", "?"))
            self.counts[name.removeprefix("jit(").removesuffix(")")] += 1
            self.seconds += duration_secs
