"""What a run's settings call records -> a source of them."""

import bisect
import dataclasses
import hashlib
import itertools
import os
from typing import Any

from paligemma_jax.data import Record, RecordSource, RowSource, open_source
from paligemma_jax.data.readers import Reader
from paligemma_jax.data.record import check_number, fingerprint
from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.mask_codec import MaskCodec


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


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several sources, one after the other; shuffled they are mixed by their sizes."""

    sources: tuple[RecordSource, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Record:
        index = check_number(index, len(self), "several sources")
        ends = list(itertools.accumulate(map(len, self.sources)))
        which = bisect.bisect_right(ends, index)
        return self.sources[which][index - (ends[which - 1] if which else 0)]

    def fingerprint(self) -> str:
        """Of all of them."""
        text = " ".join(fingerprint(source) for source in self.sources)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_records(
    given: Any, what: str, *, split: str = "train", codec: MaskCodec | None = None
) -> RecordSource:
    """The records of a path, `Data`, a source, or a sequence of records or dicts.

    A tuple of several of them are joined. `what` names them in errors, `split` is the part of a
    path that is a directory, and `codec` is for COCO's masks. Raises DatasetError, and ConfigError
    if nothing is given.
    """
    if given is None:
        raise ConfigError(
            f"There are no records: {what} is not set. A path or a source of records fits. Say "
            f"for example: --config.{what}=data/train.jsonl"
        )
    if isinstance(given, str | os.PathLike):
        return open_source(given, split)
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
    if isinstance(given, tuple) and any(isinstance(one, Data | str) for one in given):
        return Joined(tuple(open_records(one, what, split=split, codec=codec) for one in given))
    if not isinstance(given, list | tuple) and _is_source(given):
        return given
    return RowSource(given, name=what)


def _is_source(given: Any) -> bool:
    return isinstance(given, RecordSource) and len(given) > 0 and isinstance(given[0], Record)
