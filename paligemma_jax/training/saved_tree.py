"""One pytree of arrays on disk, by orbax: written in the background, read onto any devices."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.orbax_tree import as_os_error, quiet
from paligemma_jax.weights.tree import nest

_SPECS = "arrays.json"  # orbax would cast any stored dtype to any wanted one in silence
_ARRAYS = "arrays"
_LISTED = 8  # differences that an error spells out


def begin_writing(directory: Path, tree: Any) -> Callable[[], None]:
    """Starts to write `tree` into a directory that exists; call the result to wait for the end.

    The arrays may be donated or changed as soon as this returns. In a run of several processes
    each of them calls this, with a directory that all of them see. OSError where writing fails.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    leaves = _named_leaves(tree)
    if jax.process_index() == 0:
        specs = {name: _spec(leaf) for name, leaf in leaves.items()}
        (directory / _SPECS).write_text(json.dumps(specs, indent=1) + "\n")
    # On CPUs orbax would read the very memory that the next step may write into.
    copies = {name: _copy_on_cpu(leaf) for name, leaf in leaves.items()}
    with quiet(), as_os_error():
        response = ocp.save_async(str(directory.absolute() / _ARRAYS), nest(copies))

    def wait() -> None:
        with quiet(), as_os_error():
            response.result()

    return wait


def read(directory: Path, like: Any) -> Any:
    """The tree as written, in the structure of `like`, whose leaves say shape, dtype and sharding.

    Leaves of `like` are arrays or `jax.ShapeDtypeStruct`s. Raises CheckpointError where they are
    not those that were written, and OSError where they cannot be read.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    wanted = _named_leaves(like)
    try:
        stored: Mapping[str, Any] = json.loads((directory / _SPECS).read_bytes())
    except ValueError as e:
        raise OSError(f"{_SPECS} is no JSON") from e
    _require_equal(directory, stored, {name: _spec(leaf) for name, leaf in wanted.items()})
    abstract = {name: _placed(leaf) for name, leaf in wanted.items()}
    with quiet(), as_os_error():
        loaded = ocp.load(str(directory.absolute() / _ARRAYS), nest(abstract))
    found = _named_leaves(loaded)
    leaves = [found[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as "opt_state/0/mu/llm/final_norm/scale"."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    dotted = [name for name in named if "." in name]
    if dotted or len(named) < len(pairs):  # orbax would write one array for two such names
        what = f"{dotted[0]!r} has a dot" if dotted else "two of its paths are equal"
        raise CheckpointError(
            f"The tree cannot be saved: {what}. Paths without dots, each once, fit. Rename the key."
        )
    return named


def _copy_on_cpu(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or next(iter(leaf.devices())).platform != "cpu":
        return leaf
    parts = [jax.device_put(np.array(part.data), part.device) for part in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _spec(leaf: Any) -> dict[str, Any]:
    return {"dtype": np.dtype(leaf.dtype).name, "shape": list(leaf.shape)}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_equal(directory: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = [f"{name} is not in the checkpoint" for name in wanted if name not in stored]
    problems += [f"{name} is only in the checkpoint" for name in stored if name not in wanted]
    problems += [
        f"{name} is {_say(stored[name])}, not {_say(spec)}"
        for name, spec in wanted.items()
        if name in stored and stored[name] != spec
    ]
    if problems:
        more = len(problems) - _LISTED
        listing = "\n  ".join(problems[:_LISTED]) + (f"\n  and {more} more" if more > 0 else "")
        raise CheckpointError(
            f"{directory} was written by another model, optimizer or choice of trained "
            f"parameters ({len(problems)} differences):\n  {listing}\n"
            "The configuration that wrote it fits. Go on with that one, or choose a new workdir: "
            "--workdir DIR"
        )


def _say(spec: Mapping[str, Any]) -> str:
    return f"{spec['dtype']}{spec['shape']}"
