"""The safetensors files of a Hugging Face directory: one, or shards under an index."""

import json
from pathlib import Path

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.safetensors_file import SafeTensor, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_tensors(directory: Path) -> dict[str, SafeTensor]:
    """Every tensor under its name in the files; CheckpointError listing all problems at once."""
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        only = f", only the pickled {pickles[0]}, which is refused" if pickles else ""
        raise CheckpointError(
            f"{directory} has no {SINGLE} and no {INDEX}{only}. A Hugging Face directory with "
            "safetensors fits. Download it whole, or save again with: "
            "model.save_pretrained(directory, safe_serialization=True)"
        )
    weight_map = _read_index(directory / INDEX)
    tensors: dict[str, SafeTensor] = {}
    problems: list[str] = []
    for shard in sorted(set(weight_map.values())):
        problem = _unsafe(directory, shard)
        if problem:
            problems.append(problem)
            continue
        try:
            found = read_header(directory / shard)
        except CheckpointError as e:
            problems.append(str(e).split(". A whole")[0])
            continue
        for name, tensor in found.items():
            if name in tensors:
                problems.append(f"{name} is in {tensors[name].file.name} and in {shard}")
            elif name not in weight_map:
                problems.append(f"{name} of {shard} is not in the index")
            tensors[name] = tensor
        problems += [
            f"{name} is not in {shard}, where the index says it is"
            for name, where in weight_map.items()
            if where == shard and name not in found
        ]
    if problems:
        listing = "\n  ".join(problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(
            f"The shards in {directory} are not as {INDEX} says ({count}):\n"
            f"  {listing}\n"
            "All shards that the index names, whole and side by side, fit. Download the directory "
            "again."
        )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(
            f'{path} is no index of shards. JSON with "weight_map": {{tensor: file}} fits. '
            "Download it again."
        ) from e
    return weight_map


def _unsafe(directory: Path, shard: str) -> str | None:
    """Why a file the index names must not or cannot be opened."""
    path = directory / shard
    if "/" in shard or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
        return f"the index names {shard!r}, which is no plain file name"
    if not path.exists():
        return f"{shard} is missing"
    # The hub's cache links snapshots/REVISION/FILE to blobs/HASH; no other way out is allowed.
    blobs = directory.resolve().parent.parent / "blobs"
    if not any(path.resolve().is_relative_to(root) for root in (directory.resolve(), blobs)):
        return f"{shard} links to {path.resolve()}, outside of the directory"
    return None
