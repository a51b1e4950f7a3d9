"""JSON objects from files that may be missing or damaged."""

import json
from pathlib import Path
from typing import Any

from paligemma_jax.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is missing or something else."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as e:
        raise CheckpointError(
            f"{path} cannot be read: {e.strerror or e}. The {path.name} published with the weights "
            "fits. Download it into the same directory."
        ) from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{path} is no JSON: {e}. The {path.name} published with the weights fits. Download it "
            "again."
        ) from e
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds a {type(values).__name__}. A JSON object fits. Download it again."
        )
    return values
