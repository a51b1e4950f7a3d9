"""Checkpoints of random weights in Hugging Face's layout: the same for every implementation."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

from paligemma_jax.benchmark.hub_files import make_tokenizer, smallest_vocabulary
from paligemma_jax.benchmark.hub_writer import write_hugging_face
from paligemma_jax.benchmark.random_tensors import RandomTensors
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.arrays import as_float_dtype
from paligemma_jax.weights.staging import staged

_RECORD = "random-weights.json"
_VERSION = 1  # of the values: another one makes other weights from the same seed
_PUBLISHED_CAP = 30.0  # on PaliGemma 2's logits, in Hugging Face's files


def write_checkpoint(
    folder: Path, config: PaliGemmaConfig, *, seed: int = 0, dtype: str = "bfloat16"
) -> Path:
    """Writes random weights for `config` as a Hugging Face repository, and returns `folder`.

    Equal arguments give equal files, and files that are there already are taken as they are. All
    weights differ from zero, answers neither end nor repeat one token, and the tokenizer, where the
    vocabulary has room for one, spells in single characters. As in the published repositories,
    PaliGemma 2 has a soft-cap of 30 on its logits. A `sliding_window` is written where `config` has
    one; without, one that is never reached.

    One tensor is in memory at a time. The directory appears when it is complete.

    Raises:
      CheckpointError: if `folder` exists and holds something else, or cannot be written.
    """
    dtype = as_float_dtype(dtype).name
    if config.llm.post_norms and not config.llm.final_logit_softcap:
        llm = dataclasses.replace(config.llm, final_logit_softcap=_PUBLISHED_CAP)
        config = dataclasses.replace(config, llm=llm)
    record = {"version": _VERSION, "seed": seed, "dtype": dtype, "config": config.to_dict()}
    if folder.exists() and _reuse(folder, record):
        return folder
    tensors = RandomTensors(config, seed=seed, dtype=dtype)
    nbytes = sum(tensors.nbytes(key) for key in tensors.entries)
    with staged(folder, nbytes) as directory:
        write_hugging_face(directory, config, seed=seed, dtype=dtype)
        _set_window(directory / "config.json", config)
        vocabulary = config.llm.vocab_size
        if vocabulary >= smallest_vocabulary():
            (directory / "tokenizer.model").write_bytes(make_tokenizer(vocabulary))
        (directory / _RECORD).write_text(json.dumps(record, indent=2))
    return folder


def _reuse(folder: Path, record: dict[str, Any]) -> bool:
    """Whether `folder` is what would be written; removes what an earlier version has written."""
    try:
        found = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        found = {}
    if found == record:
        return True
    if found.get("version") not in (None, _VERSION):
        shutil.rmtree(folder)
        return False
    raise CheckpointError(
        f"{folder} holds something else than these random weights. A new or an equal directory "
        f"fits. Choose another one, or remove it: rm -r {folder}"
    )


def _set_window(path: Path, config: PaliGemmaConfig) -> None:
    """Makes the window of config.json the one of `config`, which a published file does not tell."""
    values = json.loads(path.read_text())
    text = values["text_config"]
    if "sliding_window" in text:
        patches = 2 ** math.ceil(math.log2(config.img.num_patches))
        never = max(text["sliding_window"], 2 * patches)
        text["sliding_window"] = config.llm.sliding_window or never
        path.write_text(json.dumps(values, indent=2))
