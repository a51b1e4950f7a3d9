"""The public names, which are loaded on first use."""

import subprocess
import sys

import pytest

import paligemma_jax as pg
from paligemma_jax import api


def test_all_names_are_those_of_api():
    public = {name for name in vars(api) if not name.startswith("_")}
    assert {"from_pretrained", "generate", "VARIANTS"} <= public <= set(dir(pg))
    assert all(getattr(pg, name) is getattr(api, name) for name in public)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pg.nonsense  # noqa: B018


def test_rooms_are_there_as_after_any_import():
    assert pg.models.paligemma.PaliGemma is pg.PaliGemma


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
