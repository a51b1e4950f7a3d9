"""What each of two processes does that start together; imports nothing heavy."""

import os
from typing import Any

from paligemma_jax.hub.catalogue import Location
from paligemma_jax.hub.download import download


def fetch_at_once(location: Location, barrier: Any, results: Any) -> None:
    """Puts the path into `results`, or what went wrong."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    barrier.wait(60)
    try:
        results.put(str(download(location)))
    except Exception as e:
        results.put(repr(e))
