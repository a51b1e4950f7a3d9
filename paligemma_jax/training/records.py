"""What a run's settings call records -> a source of them."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from paligemma_jax.data import Record, RecordSource, RowSource, open_source
from paligemma_jax.data.joined import Joined
from paligemma_jax.data.mixture import Mixture, Part
from paligemma_jax.data.readers import Reader
from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.resolve import find_checkpoint
from paligemma_jax.weights.checkpoint import open_checkpoint


@dataclasses.dataclass(frozen=True)
class Data:
    """Records on disk, opened when a run starts; see `paligemma_jax.data.open_source`.

    Attributes:
      path: a file or a directory in any known layout.
      split: which part of a directory.
      reader: makes a record of a row, of JSON lines and TensorFlow Datasets.
      images: the folder of the pictures, where it is not the layout's.
      masks: COCO's masks are the answer, by the mask codec of the checkpoint.
    """

    path: str
    split: str = "train"
    reader: Reader | None = None
    images: str | None = None
    masks: bool = False


def open_records(
    given: Any, what: str, *, split: str = "train", codec: MaskCodec | None = None
) -> RecordSource:
    """The records of a path, `Data`, a source, or a sequence of records or dicts.

    A tuple of several of them are joined, and each part of a `Mixture` is opened. `what` names them
    in errors, `split` is the part of a path that is a directory, and `codec` is for COCO's masks.
    Raises DatasetError, and ConfigError for nothing, or a mixture where none can be.
    """
    if given is None:
        raise ConfigError(
            f"There are no records: {what} is not set. A path or a source of records fits. Say "
            f"for example: --config.{what}=data/train.jsonl"
        )
    if isinstance(given, str | os.PathLike):
        return open_source(given, split)
    if isinstance(given, Mixture):
        return given.opened(
            lambda one, place: open_records(one, f"{what}[{place}]", split=split, codec=codec)
        )
    if isinstance(given, Part):
        raise ConfigError(
            f"{what} is a part of a mixture, without the mixture. All parts together fit: "
            "Mixture(Part(captions, 3.0), Part(boxes, 1.0))"
        )
    if isinstance(given, Data):
        if given.masks and codec is None:
            raise ConfigError(
                f"The masks of {given.path} cannot be made into tokens: the checkpoint has no mask "
                "codec. One with it fits: paligemma convert SOURCE TARGET --mask-codec vae-oid.npz"
            )
        return open_source(
            given.path,
            given.split,
            images=given.images,
            reader=given.reader,
            codec=codec if given.masks else None,
        )
    if isinstance(given, tuple) and any(not isinstance(one, Mapping | Record) for one in given):
        if any(isinstance(one, Mixture | Part) for one in given):
            raise ConfigError(
                f"{what} is a tuple with a mixture or a part of one in it. One mixture of all "
                "fits: Mixture(Part(captions, 3.0), Part(boxes, 1.0))"
            )
        return Joined(tuple(open_records(one, what, split=split, codec=codec) for one in given))
    if not isinstance(given, list | tuple) and _is_source(given):
        return given
    return RowSource(given, name=what)


def first_records(source: RecordSource, count: int) -> list[Record]:
    """So many records to look at: those of a mixture by its weights."""
    if not isinstance(source, Mixture):
        return [source[number] for number in range(count)]
    order = source.order(seed=0, shuffle=False)
    return [source[order.draw(place).number] for place in range(count)]


def mask_codec(model: str) -> MaskCodec | None:
    """That of a checkpoint; None where it has none."""
    with open_checkpoint(find_checkpoint(model)) as checkpoint:
        vae = checkpoint.mask_codec
    return None if vae is None else MaskCodec(vae)


def _is_source(given: Any) -> bool:
    return isinstance(given, RecordSource) and len(given) > 0 and isinstance(given[0], Record)
