"""What each of two processes does that start together; imports nothing heavy."""

import os
from typing import Any

from paligemma_jax.hub.catalogue import Source
from paligemma_jax.hub.download import fetch_fetch


def fetch_at_once(source: Source, barrier: Any, results: Any) -> None:
    """Puts the path into `results`, or what went wrong."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    barrier.wait(60)
    try:
        results.put(str(fetch_fetch(source)))
    except Exception as e:
        results.put(repr(e))
