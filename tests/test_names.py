"""The public names, which are loaded on first use."""

import subprocess
import sys

import pytest

import paligemma_jax as pg


def test_every_public_name_is_there():
    assert {"from_pretrained", "generate", "VARIANTS"} <= set(pg.__all__)
    assert dir(pg) == sorted([*pg.__all__, "__version__"])
    for name in pg.__all__:
        assert getattr(pg, name).__name__ if callable(getattr(pg, name)) else True


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pg.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "program",
    [
        "import paligemma_jax as pg; pg.generate",
        "from paligemma_jax.generation.sampling import Greedy; import paligemma_jax as pg",
        "from paligemma_jax import Pipeline, generate; import paligemma_jax as pg",
    ],
)
def test_generate_is_the_function_however_it_was_imported(program: str):
    check = f"{program}\nassert type(pg.generate).__name__ == 'function', pg.generate"
    subprocess.run([sys.executable, "-c", check], check=True)
