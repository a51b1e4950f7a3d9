"""What a user calls a model -> where its files are."""

import difflib
import os
from pathlib import Path

from paligemma_jax.config import VARIANTS
from paligemma_jax.demo.location import demo_checkpoint
from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub.catalogue import find_published
from paligemma_jax.hub.fetch import cached, fetch
from paligemma_jax.hub.meter import Progress
from paligemma_jax.hub.sources import find_source

DEMO = "demo"


def published_name(name: str) -> str | None:
    """The name in `VARIANTS` of a published model, called by any name that it has at any hub."""
    for prefix in ("hf://", "kaggle://"):
        name = name.removeprefix(prefix)
    entry = find_published(name.partition("@")[0])
    return None if entry is None else entry.name


def near_names(name: str) -> list[str]:
    """Known names that look like a mistyped one, the likeliest first."""
    known = [DEMO, *VARIANTS]
    return difflib.get_close_matches(name.removeprefix("google/").lower(), known, n=3, cutoff=0.5)


def find_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    download: bool = True,
) -> Path:
    """Path of the demo model, of a checkpoint on disk, or of one from a hub, downloaded if needed.

    Args:
      name_or_path: a path; "demo"; a published name or any of its aliases; "owner/name" at Hugging
        Face; a handle at Kaggle; an address (https, gs, hf, kaggle). A path that exists goes first.
      revision: a branch, tag or commit at Hugging Face; "NAME@REVISION" is the same.
      progress: called with what is being downloaded, bytes done and bytes in all.
      download: False takes what is in the cache, and asks no hub.

    Raises:
      CheckpointError: for what cannot be downloaded, saying what to do, and for anything unknown,
        with the names that look like it.
      MissingExtraError: where the client of the hub is not installed.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name == DEMO and not path.exists():
        return demo_checkpoint()
    if path.exists():
        if revision is not None:
            raise CheckpointError(
                f"{path} is here, and has no revisions. They are those of repositories at Hugging "
                f"Face. Leave the revision out, or ask for: hf://{name}"
            )
        return path
    source = find_source(name, revision)
    if source is not None:
        if download:
            return fetch(source, progress)
        found = cached(source)
        if found is not None:
            return found
        raise CheckpointError(
            f"{name} is not here, and not in the cache. A downloaded model fits. Run: "
            f"paligemma download {name}"
        )
    near = near_names(name)
    hint = f" Did you mean {' or '.join(near)}?" if near and name.count(os.sep) < 2 else ""
    raise CheckpointError(
        f"{name} is neither a file, nor a directory, nor a known model.{hint} A path, a published "
        'name such as paligemma2-3b-mix-448, or "demo" fits. See: paligemma models'
    )
