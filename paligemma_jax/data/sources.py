"""Sources of records: JSON lines, TensorFlow Datasets, any sequence; and the layout of a path.

A line of JSON, as Roboflow, big_vision and others write it:

    {"image": "a.jpg", "prefix": "detect cat", "suffix": "<loc0364><loc0504><loc0806><loc0605> cat"}

TensorFlow Datasets are read without TensorFlow where they were prepared as array_record; that needs
the extra "data".
"""

import dataclasses
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.data.coco import CocoSource
from paligemma_jax.data.object_readers import ObjectReader, Referring
from paligemma_jax.data.readers import Fields, Reader
from paligemma_jax.data.record import (
    ImageFolder,
    Problem,
    ProblemKind,
    Record,
    RecordSource,
    check_index,
    short_name,
)
from paligemma_jax.errors import DatasetError, MissingExtraError
from paligemma_jax.processing.masks import MaskCodec

_BOM = b"\xef\xbb\xbf"
_OBJECT = '{"image": "cat.jpg", "prefix": "caption en", "suffix": "a cat"}'
_BUILD = "tfds build --file_format array_record"


class JsonlSource:
    """The lines of a file, read when they are asked for; only their offsets are kept.

    Args:
      path: the file, in UTF-8. Blank lines are skipped, and counted in `blank_lines`.
      images: the folder that names of images refer to; the file's own if not given.
      reader: which fields a record is made of; "image", "prefix" and "suffix" if not given.

    Raises DatasetError for a file that cannot be read or has no lines.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        images: str | os.PathLike[str] | ImageFolder | None = None,
        reader: Reader | None = None,
    ):
        self.path = Path(path).expanduser()
        self.images = ImageFolder.of(images, self.path.parent)
        self.reader = reader or Fields()
        try:
            with self.path.open("rb") as file:
                self._stamp = _stamp(file.fileno())
                self._scan(file)
        except OSError as e:
            raise DatasetError(
                f"The data file {self.path} cannot be read: {e.strerror}. Look with: ls -l "
                f"{shlex.quote(str(self.path.parent))}"
            ) from e
        if not len(self):
            raise DatasetError(
                f"The data file {self.path} has no records, expected a JSON object on each line, "
                f"such as {_OBJECT}"
            )

    def _scan(self, file: Any) -> None:
        starts, numbers, blank, position = [], [], [], 0
        checksum = hashlib.sha256()
        for number, line in enumerate(file, start=1):
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DatasetError(
                        f"The data file {self.path} must be in UTF-8, got UTF-16. Convert it, for "
                        f"example: iconv -f UTF-16 -t UTF-8 '{self.path}'"
                    )
                if line.startswith(_BOM):
                    position, line = len(_BOM), line[len(_BOM) :]
            checksum.update(line)
            if line.strip():
                starts.append(position)
                numbers.append(number)
            else:
                blank.append(number)
            position += len(line)
        self._starts = np.array(starts, np.int64)
        self._numbers = np.array(numbers, np.int64)
        self.blank_lines: tuple[int, ...] = tuple(blank)
        self._checksum = checksum.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        index = check_index(index, len(self), self.path)
        record_id = f"{short_name(self.path)}:{self._numbers[index]}"
        with self.path.open("rb") as file:
            if _stamp(file.fileno()) != self._stamp:
                raise DatasetError(
                    f"The data file {self.path} has changed since it was opened. Start again, or "
                    "train on a copy."
                )
            file.seek(self._starts[index])
            line = file.readline()
        try:
            example = _json_object(line)
            for name in set(self.reader.image_fields) & set(example):
                example[name] = self.images.paths_of(example[name])
            return self.reader(example, record_id)
        except DatasetError as e:
            raise DatasetError(f"{self.path}:{self._numbers[index]}: {e}") from e

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Blank lines; what is wrong with records is told when they are read."""
        return tuple(
            Problem(ProblemKind.BLANK, f"{short_name(self.path)}:{number}", "the line is blank")
            for number in self.blank_lines
        )

    def fingerprint(self) -> str:
        """Of the file's contents."""
        return self._checksum

    def __repr__(self) -> str:
        return f"JsonlSource({str(self.path)!r})"


def _json_object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; raises DatasetError."""
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as e:
        raise DatasetError(f"the line is not UTF-8 at byte {e.start}. Save the file again.") from e
    except (json.JSONDecodeError, RecursionError) as e:
        where = f" at character {e.pos}: {e.msg}" if isinstance(e, json.JSONDecodeError) else ""
        cut = "" if line.rstrip().endswith(b"}") else " The line seems to be cut short."
        raise DatasetError(f"the line is not JSON{where}.{cut} Expected {_OBJECT}") from e
    if not isinstance(value, dict):
        raise DatasetError(f"expected {_OBJECT} on the line, got {json.dumps(value)[:40]}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DatasetError(f"the line gives {' and '.join(twice)} twice. Write each field once.")
    return found


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


class SequenceSource:
    """Records from anything with a length and entries by index: `Record`s or mappings.

    A `datasets.Dataset` of Hugging Face is one; of a `DatasetDict` take a split. `reader` makes a
    record of a mapping; without, its "image", "prefix" and "suffix" are taken. `name` goes into
    the ids. Raises DatasetError for what has no length, and for an empty sequence.
    """

    def __init__(self, examples: Any, reader: Reader | None = None, name: str = "record"):
        indexed = hasattr(examples, "__len__") and hasattr(examples, "__getitem__")
        if isinstance(examples, Mapping) or not indexed:
            raise DatasetError(
                "Expected a list of records, or one split of a dataset that is not streamed, got "
                f"{type(examples).__name__}. Take a split, such as dataset['train'], or call list()"
            )
        if not len(examples):
            raise DatasetError("There are no records. Check how the list was made.")
        self.examples = examples
        self.reader = reader or Fields()
        self.name = name

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Record:
        index = check_index(index, len(self), self.name)
        record_id = f"{self.name}:{index}"
        try:
            example = self.examples[index]
        except Exception as e:  # a dataset that decodes images fails with whatever they hold
            raise DatasetError(f"{record_id} cannot be read: {type(e).__name__}: {e}") from e
        if isinstance(example, Record):
            return example
        if not isinstance(example, Mapping):
            raise DatasetError(
                f"{record_id}: expected a Record or a dict such as {_OBJECT}, got "
                f"{type(example).__name__}"
            )
        try:
            return self.reader(example, record_id)
        except DatasetError as e:
            raise DatasetError(f"{record_id}: {e}") from e

    def __repr__(self) -> str:
        return f"SequenceSource({type(self.examples).__name__} of {len(self)}, name={self.name!r})"


class TfdsSource:
    """One split of a prepared TensorFlow dataset; images stay encoded until they are needed.

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
                f"{self.path} must be the directory of a prepared version, such as "
                "~/tensorflow_datasets/coco_captions/2014/1.1.0; it has no dataset_info.json. "
                f"Prepare one with: {_BUILD}"
            )
        self._open()
        if not len(self._data):
            raise DatasetError(f"{self.path} has no examples in {split!r}")

    def _open(self) -> None:
        try:
            import tensorflow_datasets as tfds

            builder: Any = tfds.builder_from_directory(os.fspath(self.path))
            self._features: Any = builder.info.features
            decoders = decoders_of(self._features)
            self._data: Any = builder.as_data_source(split=self.split, decoders=decoders)
        except ImportError as e:
            raise MissingExtraError("Reading TensorFlow Datasets", "data") from e
        except Exception as e:  # of many kinds, for what its files may hold
            raise DatasetError(
                f"{self.path} cannot be read: {_first_line(e)} Prepare it again with: {_BUILD}"
            ) from e
        splits = builder.info.splits
        self._fingerprint = f"{builder.info.full_name} {self.split} {len(self._data)} " + " ".join(
            f"{name}:{splits[name].num_bytes}" for name in sorted(splits)
        )

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        record_id = f"{self.split}:{check_index(index, len(self), f'{self.path} {self.split}')}"
        try:
            example = self._data[index]
        except Exception as e:  # array_record's own checksums raise several kinds
            raise DatasetError(
                f"{self.path}: {record_id} cannot be read: {_first_line(e)} Prepare or copy the "
                "data set again."
            ) from e
        try:
            return self.reader(plain_example(example, self._features), record_id)
        except DatasetError as e:
            raise DatasetError(f"{self.path}: {record_id}: {e}") from e

    def __reduce__(self) -> tuple[Any, ...]:
        return TfdsSource, (self.path, self.split, self.reader)  # opened anew in each process

    def fingerprint(self) -> str:
        """Of the name, the version, the split and the sizes."""
        return self._fingerprint

    def __repr__(self) -> str:
        return f"TfdsSource({str(self.path)!r}, {self.split!r})"


def decoders_of(features: Any) -> dict[str, Any]:
    """Decoders that leave images encoded, those inside objects too."""
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


def plain_example(value: Any, feature: Any) -> Any:
    """What tfds read, as readers take it: text as str, class labels as names, lists as lists."""
    inner = getattr(feature, "feature", None)
    if isinstance(value, dict):
        features: Any = feature if hasattr(feature, "keys") else inner
        return {name: plain_example(entry, features[name]) for name, entry in value.items()}
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
        return [plain_example(entry, None) for entry in value]
    return value


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(".") + "."


_VALIDATION = ("valid", "val", "validation", "dev")  # names of one split
_KNOWN = (
    "Expected a .jsonl file; a COCO .json file; a directory with "
    'dataset/_annotations.train.jsonl (Roboflow "paligemma"), train/annotations.jsonl (Roboflow '
    '"jsonl"), train/_annotations.coco.json, or annotations/instances_train2017.json beside '
    "train2017/ (COCO); or a version of a data set that tfds prepared as array_record."
)


def open_source(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    images: str | os.PathLike[str] | ImageFolder | None = None,
    reader: Reader | None = None,
    codec: MaskCodec | None = None,
) -> RecordSource:
    """The records at `path`, a file or a directory in one of the layouts of `find_splits`.

    Args:
      path: where the data is.
      split: which split; ignored for a single file. "valid", "val" and "validation" are the same.
      images: the folder of the images, if it is not the one of the layout.
      reader: which fields a record is made of, of JSON lines and TensorFlow Datasets.
      codec: makes masks the answer: of COCO, `ObjectReader` and `Referring`.

    Raises DatasetError for an unknown layout or split.
    """
    found = find_splits(path)
    same = _VALIDATION if split in _VALIDATION else (split,)
    name = next((name for name in found if name in ("", *same)), None)
    file = next(iter(found.values())) if name is None else found[name]
    if codec is not None and isinstance(reader, ObjectReader | Referring):
        reader = dataclasses.replace(reader, codec=codec)
    if file.is_dir():  # tfds reads "train[:90%]" and "train+validation" too
        return TfdsSource(file, name or split, reader)
    if name is None:
        raise DatasetError(
            f"{path} has no split {split!r}, only {', '.join(found)}. Open for example: "
            f"open_source({os.fspath(path)!r}, {next(iter(found))!r})"
        )
    if file.suffix == ".jsonl":
        return JsonlSource(file, images, reader)
    if images is None:
        images = coco_image_folder(file)
    return CocoSource(file, images, codec=codec)


def find_splits(path: str | os.PathLike[str]) -> dict[str, Path]:
    """The splits at `path` by name, and the file (for TensorFlow Datasets, directory) of each.

    A file is a split without a name. Raises DatasetError if there is none.
    """
    path = Path(path).expanduser()
    if not path.exists():
        where = shlex.quote(str(path.parent))
        raise DatasetError(f"There is no data at {path}. {_KNOWN} Look with: ls {where}")
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise DatasetError(f"{path} is neither .jsonl nor .json. {_KNOWN}")
        return {"": path}
    if (path / "dataset_info.json").is_file():
        found = _tfds_splits(path)
    else:
        found: dict[str, Path] = {}
        for name, file in _annotation_files(path):
            found.setdefault(name, file)
    if not found:
        lines = sorted(path.glob("*.jsonl"))
        found = {"": lines[0]} if len(lines) == 1 else {file.stem: file for file in lines}
    if not found:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise DatasetError(f"{path} holds no data of a known layout, but {inside}. {_KNOWN}")
    order = ("train", *_VALIDATION, "test")
    rank = {name: order.index(name) if name in order else len(order) for name in found}
    return {name: found[name] for name in sorted(found, key=lambda name: (rank[name], name))}


def _annotation_files(path: Path) -> Iterator[tuple[str, Path]]:
    for folder in (path, path / "dataset"):
        for file in sorted(folder.glob("_annotations.*.jsonl")):
            yield file.name.split(".")[1], file
    for name in ("annotations.jsonl", "_annotations.coco.json"):
        for file in sorted(path.glob(f"*/{name}")):
            yield file.parent.name, file
        if (path / name).is_file():
            yield "", path / name
    for file in sorted((path / "annotations").glob("instances_*.json")):
        if match := re.fullmatch(r"instances_([a-z]+)\d*", file.stem):
            yield match[1], file


def coco_image_folder(file: Path) -> Path | None:
    """COCO keeps images beside the folder of annotations, in one of the split's name."""
    match = re.fullmatch(r"instances_([a-z]+\d*)", file.stem)
    if match and file.parent.name == "annotations":
        for folder in (file.parents[1] / match[1], file.parents[1] / "images" / match[1]):
            if folder.is_dir():
                return folder
    return None


def _tfds_splits(path: Path) -> dict[str, Path]:
    files = [file.name for file in path.iterdir() if ".array_record" in file.name]
    if not files:
        raise DatasetError(
            f"{path} is a data set of tfds without array_record files; others need TensorFlow. "
            f"Prepare it again with: {_BUILD}"
        )
    return {name.split(".array_record")[0].partition("-")[2]: path for name in files}
