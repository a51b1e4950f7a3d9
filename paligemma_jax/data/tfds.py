"""Data sets prepared by TensorFlow Datasets, read without TensorFlow; needs the extra "data".

Prepared with `file_format="array_record"`: `tfds build --file_format array_record`.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.data.readers import Fields, Reader
from paligemma_jax.data.record import Record, check_number
from paligemma_jax.errors import DatasetError, MissingExtraError


class TfdsSource:
    """One split of a prepared data set; pictures stay encoded until they are needed.

    Args:
      path: the directory of the version, with its dataset_info.json.
      split: such as "train", or "train[:90%]".
      reader: makes a record of an example. Text is given to it as str, a ClassLabel as its name.

    Raises MissingExtraError without tensorflow-datasets and array_record, DatasetError for what
    cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], split: str = "train", reader: Reader | None = None
    ):
        self.path = Path(path).expanduser()
        self.split = split
        self.reader = reader or Fields()
        if not (self.path / "dataset_info.json").is_file():
            raise DatasetError(
                f"{self.path} is no prepared data set: it has no dataset_info.json. The directory "
                "of a version fits, such as ~/tensorflow_datasets/coco_captions/2014/1.1.0. "
                "Prepare one with: tfds build --file_format array_record"
            )
        self._open()
        if not len(self._data):
            raise DatasetError(f"{self.path} has no examples in {split!r}. At least one fits.")

    def _open(self) -> None:
        try:
            import tensorflow_datasets as tfds
        except ImportError as e:
            raise MissingExtraError("Reading TensorFlow Datasets", "data") from e
        try:
            builder: Any = tfds.builder_from_directory(os.fspath(self.path))
            features: Any = builder.info.features
            decoders = decoders_of(features)
            self._data: Any = builder.as_data_source(split=self.split, decoders=decoders)
        except MissingExtraError:
            raise
        except ImportError as e:
            raise MissingExtraError("Reading TensorFlow Datasets", "data") from e
        except Exception as e:  # of many kinds, for what its files may hold
            raise DatasetError(
                f"{self.path} cannot be read: {_first_line(e)} A data set prepared as array_record "
                "fits. Prepare it again with: tfds build --file_format array_record"
            ) from e
        self._features = features
        shards = builder.info.splits
        self._digest = f"{builder.info.full_name} {self.split} {len(self._data)} " + " ".join(
            f"{name}:{shards[name].num_bytes}" for name in sorted(shards)
        )

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        index = check_number(index, len(self), f"{self.path} {self.split}")
        place = f"{self.split}:{index}"
        try:
            row = self._data[index]
        except Exception as e:  # array_record's own checksums raise several kinds
            raise DatasetError(
                f"{self.path}: {place} cannot be read: {_first_line(e)} A whole file fits. "
                "Prepare or copy the data set again."
            ) from e
        try:
            return self.reader(plain_row(row, self._features), place)
        except DatasetError as e:
            raise DatasetError(f"{self.path}: {place}: {e}") from e

    def __reduce__(self) -> tuple[Any, ...]:
        return TfdsSource, (self.path, self.split, self.reader)  # opened anew, files stay behind

    def fingerprint(self) -> str:
        """Of the name, the version, the split and the sizes."""
        return self._digest

    def __repr__(self) -> str:
        return f"TfdsSource({str(self.path)!r}, {self.split!r})"


def decoders_of(features: Any) -> dict[str, Any]:
    """Decoders that leave pictures encoded, those inside objects too."""
    import tensorflow_datasets as tfds

    found: dict[str, Any] = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)  # of a sequence
        if isinstance(inner, tfds.features.Image):
            skip: Any = tfds.decode.SkipDecoding()
            skip.decode_batch_example_np = skip.decode_example_np  # of a sequence; it lacks that
            found[name] = skip
        elif isinstance(inner, tfds.features.FeaturesDict) and (below := decoders_of(inner)):
            found[name] = below
    return found


def plain_row(value: Any, feature: Any) -> Any:
    """What tfds read, as readers take it: text as str, class labels as names, lists as lists."""
    inner = getattr(feature, "feature", None)
    if isinstance(value, dict):
        features: Any = feature if hasattr(feature, "keys") else inner
        return {name: plain_row(entry, features[name]) for name, entry in value.items()}
    kind = type(feature if inner is None else inner).__name__
    if kind == "Image" or value is None:
        return value
    if kind == "ClassLabel":
        label = feature if inner is None else inner
        numbers = np.asarray(value)
        names = [label.int2str(int(n)) if n >= 0 else "" for n in numbers.ravel()]
        return names if numbers.ndim else names[0]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray) and value.dtype.kind in "OS":
        return [plain_row(entry, None) for entry in value]
    return value


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(".") + "."
