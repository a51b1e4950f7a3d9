"""PaliGemma and PaliGemma 2 in JAX and Flax.

    import paligemma_jax as pg
    pali = pg.from_pretrained("demo")
    print(pali.caption("picture.png"), pali.detect("picture.png", "circle"))

The names are those of `paligemma_jax.api`. They come with JAX and Flax, which take seconds to
import, so they are loaded on first use: `paligemma --help` answers at once.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paligemma_jax.api import *  # noqa: F403

__version__ = "0.1.0"


class _Package(types.ModuleType):
    """This package as a module on which `generate` stays the function.

    The import system would put the room of the same name there as soon as something imports it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "generate" or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


def _load() -> None:
    api = importlib.import_module("paligemma_jax.api")
    globals().update({k: v for k, v in vars(api).items() if not k.startswith("_")})


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and "from_pretrained" not in globals():
        _load()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    if "from_pretrained" not in globals():
        _load()
    return sorted(globals())


sys.modules[__name__].__class__ = _Package
