"""What a user calls a model -> where its files are."""

import difflib
import os
from pathlib import Path

from paligemma_jax.config import VARIANTS
from paligemma_jax.demo.location import demo_checkpoint
from paligemma_jax.errors import CheckpointError

DEMO = "demo"


def published_name(name: str) -> str | None:
    """The name in `VARIANTS` of a published id such as "google/paligemma-3b-pt-224"."""
    short = name.removeprefix("google/").lower()
    return short if short in VARIANTS else None


def near_names(name: str) -> list[str]:
    """Known names that look like a mistyped one, the likeliest first."""
    known = [DEMO, *VARIANTS]
    return difflib.get_close_matches(name.removeprefix("google/").lower(), known, n=3, cutoff=0.5)


def find_checkpoint(name_or_path: str | os.PathLike[str]) -> Path:
    """Path of the demo model, or of a checkpoint on disk.

    Raises:
      CheckpointError: for a published name whose files are not here, saying how to get them, and
        for anything unknown, with the names that look like it.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name == DEMO and not path.exists():
        return demo_checkpoint()
    if path.exists():
        return path
    published = published_name(name)
    if published:
        raise CheckpointError(
            f"{name} is a published model, and its files are not here: this version does not "
            "download. A directory with its files fits. Accept the licence on the model's page at "
            f"Hugging Face, then run: hf download google/{published} --local-dir {published}; and "
            f"pass that directory: {published}"
        )
    near = near_names(name)
    hint = f" Did you mean {' or '.join(near)}?" if near and os.sep not in name else ""
    raise CheckpointError(
        f"{name} is neither a file, nor a directory, nor a known model.{hint} A path, a published "
        'name such as paligemma2-3b-mix-448, or "demo" fits. See: paligemma info --list'
    )
