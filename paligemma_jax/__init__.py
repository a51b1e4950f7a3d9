"""PaliGemma and PaliGemma 2 in JAX and Flax.

    import paligemma_jax as pg
    pali = pg.from_pretrained("demo")
    print(pali.caption("picture.png"), pali.detect("picture.png", "circle"))

The names are those of `paligemma_jax.api`. They come with JAX and Flax, which take seconds to
import, so they are loaded on first use: `paligemma --help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paligemma_jax.api import *  # noqa: F403

__version__ = "0.1.0"


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
