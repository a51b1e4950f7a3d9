"""A path -> the source of records it holds, whatever the layout.

Records in JSON lines, as Roboflow, big_vision and others write them.

{"image": "cat.jpg", "prefix": "detect cat", "suffix": "<loc0364><loc0504><loc0806><loc0605> cat"}

Data sets prepared by TensorFlow Datasets, read without TensorFlow; needs the extra "data".

Prepared with `file_format="array_record"`: `tfds build --file_format array_record`.

Records from what Python holds already: a list of records or dicts, a Hugging Face dataset.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.data.coco import CocoDetection, CocoSegmentation
from paligemma_jax.data.readers import Fields, Reader, Referring
from paligemma_jax.data.record import (
    ImageFolder,
    Problem,
    ProblemKind,
    Record,
    RecordSource,
    check_number,
    short_name,
)
from paligemma_jax.errors import DatasetError, MissingExtraError
from paligemma_jax.processing.masks import MaskCodec

_BOM = b"\xef\xbb\xbf"


class JsonlSource:
    """The lines of a file, read when they are asked for; only where they begin is kept.

    Args:
      path: the file, in UTF-8. Blank lines are passed over, and counted in `blank_lines`.
      images: the folder that names of pictures refer to; the file's own if not given.
      reader: which fields a record is made of; "image", "prefix" and "suffix" if not given.

    Raises DatasetError for a file that cannot be read, has no lines, or is no text.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        images: str | os.PathLike[str] | ImageFolder | None = None,
        reader: Reader | None = None,
    ):
        self.path = Path(path).expanduser()
        folder = self.path.parent if images is None else images
        self.images = folder if isinstance(folder, ImageFolder) else ImageFolder(Path(folder))
        self.reader = reader or Fields()
        try:
            with self.path.open("rb") as file:
                self._stamp = _stamp(file.fileno())
                self._scan(file)
        except OSError as e:
            raise DatasetError(
                f"The data file {self.path} cannot be read: {e.strerror}. A file with a JSON "
                f"object in each line fits. Look with: ls -l {self.path.parent}"
            ) from e
        if not len(self):
            raise DatasetError(
                f"The data file {self.path} has no records. At least one line with a JSON object "
                'fits, such as {"image": "cat.jpg", "prefix": "caption en", "suffix": "a cat"}.'
            )

    def _scan(self, file: Any) -> None:
        starts, numbers, blank, position = [], [], [], 0
        digest = hashlib.sha256()
        for number, line in enumerate(file, start=1):
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DatasetError(
                        f"The data file {self.path} is in UTF-16. UTF-8 fits. Convert it, for "
                        f"example: iconv -f UTF-16 -t UTF-8 {self.path}"
                    )
                if line.startswith(_BOM):
                    position, line = len(_BOM), line[len(_BOM) :]
            digest.update(line)
            if line.strip():
                starts.append(position)
                numbers.append(number)
            else:
                blank.append(number)
            position += len(line)
        self._starts = np.array(starts, np.int64)
        self._numbers = np.array(numbers, np.int64)
        self.blank_lines: tuple[int, ...] = tuple(blank)
        self._digest = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        index = check_number(index, len(self), self.path)
        place = f"{short_name(self.path)}:{self._numbers[index]}"
        with self.path.open("rb") as file:
            if _stamp(file.fileno()) != self._stamp:
                raise DatasetError(
                    f"The data file {self.path} has changed since it was opened. A file that "
                    "stays as it is fits. Start again, or train on a copy."
                )
            file.seek(self._starts[index])
            line = file.readline()
        try:
            return self.reader(self._with_paths(_object(line)), place)
        except DatasetError as e:
            raise DatasetError(f"{self.path}:{self._numbers[index]}: {e}") from e

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Blank lines: what is wrong with records is told when they are read."""
        return tuple(
            Problem(ProblemKind.BLANK, f"{short_name(self.path)}:{number}", "the line is blank")
            for number in self.blank_lines
        )

    def fingerprint(self) -> str:
        """Of the file's contents."""
        return self._digest

    def __repr__(self) -> str:
        return f"JsonlSource({str(self.path)!r})"

    def _with_paths(self, row: dict[str, Any]) -> dict[str, Any]:
        for name in self.reader.image_fields:
            value = row.get(name)
            if isinstance(value, str):
                row[name] = self.images.path_of(value)
            elif isinstance(value, list):
                row[name] = [self.images.path_of(entry) for entry in value]
        return row


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; raises DatasetError."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as e:
        raise DatasetError(
            f"the line is not UTF-8 at byte {e.start}. Text in UTF-8 fits. Save the file again."
        ) from e
    except (json.JSONDecodeError, RecursionError) as e:
        where = f" at character {e.pos}: {e.msg}" if isinstance(e, json.JSONDecodeError) else ""
        cut = "" if line.rstrip().endswith(b"}") else " The line seems to be cut short."
        raise DatasetError(
            f"the line is no JSON{where}.{cut} An object such as "
            '{"image": "cat.jpg", "prefix": "caption en", "suffix": "a cat"} fits. Mend the line.'
        ) from e
    if not isinstance(row, dict):
        raise DatasetError(
            f"the line holds {_kind(row)} instead of an object. "
            '{"image": "cat.jpg", "prefix": "caption en", "suffix": "a cat"} fits. Mend the line.'
        )
    return row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DatasetError(
            f"the line gives {' and '.join(twice)} twice. Each field once fits. Mend the line."
        )
    return row


def _kind(value: Any) -> str:
    kinds: Mapping[type, str] = {list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), "a number")


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


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


_SAME = ("valid", "val", "validation", "dev")  # names of one split
_KNOWN = (
    "A .jsonl file; a COCO .json file; a directory with dataset/_annotations.train.jsonl (Roboflow "
    '"paligemma"), train/annotations.jsonl (Roboflow "jsonl"), train/_annotations.coco.json, or '
    "annotations/instances_train2017.json beside train2017/ (COCO); and a version of a data set "
    "that tfds prepared as array_record fit."
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
      split: which part; ignored for a single file. "valid", "val" and "validation" are the same.
      images: the folder of the pictures, if it is not the one of the layout.
      reader: which fields a record is made of, of JSON lines and TensorFlow Datasets.
      codec: makes COCO's masks the answer, and not its boxes alone; and encodes for `Referring`.

    Raises DatasetError for an unknown layout or split.
    """
    found = find_splits(path)
    name = next((name for name in found if name in ("", split) or _same(name, split)), None)
    place = next(iter(found.values())) if name is None else found[name]
    if codec is not None and isinstance(reader, Referring):
        reader = dataclasses.replace(reader, codec=codec)
    if place.is_dir():  # tfds reads "train[:90%]" and "train+validation" too
        return TfdsSource(place, name or split, reader)
    if name is None:
        near = next(iter(found))
        raise DatasetError(
            f"{path} has no split {split!r}. {', '.join(found)} fits. Open for example: "
            f"open_source({os.fspath(path)!r}, {near!r})"
        )
    if place.suffix == ".jsonl":
        return JsonlSource(place, images, reader)
    if images is None:
        images = coco_image_folder(place)
    if codec is not None:
        return CocoSegmentation(place, codec, images)
    return CocoDetection(place, images)


def find_splits(path: str | os.PathLike[str]) -> dict[str, Path]:
    """The splits at `path` by name, and the file (for TensorFlow Datasets, directory) of each.

    A file is a split without a name. Raises DatasetError if there is none.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DatasetError(f"There is no data at {path}. {_KNOWN} Look with: ls {path.parent}")
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise DatasetError(f"{path} is neither .jsonl nor .json. {_KNOWN} Name such a file.")
        return {"": path}
    if (path / "dataset_info.json").is_file():
        return _tfds_splits(path)
    found: dict[str, Path] = {}
    for name, file in _candidates(path):
        found.setdefault(name, file)
    if not found:
        lines = sorted(path.glob("*.jsonl"))
        found = {"": lines[0]} if len(lines) == 1 else {file.stem: file for file in lines}
    if not found:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise DatasetError(f"{path} holds no data of a known layout: {inside}. {_KNOWN}")
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _candidates(path: Path) -> Iterator[tuple[str, Path]]:
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
    """COCO keeps pictures beside the folder of annotations, in one of the split's name."""
    match = re.fullmatch(r"instances_([a-z]+\d*)", file.stem)
    if match and file.parent.name == "annotations":
        for folder in (file.parents[1] / match[1], file.parents[1] / "images" / match[1]):
            if folder.is_dir():
                return folder
    return None


def _tfds_splits(path: Path) -> dict[str, Path]:
    names = {file.name.split(".array_record")[0].partition("-")[2] for file in path.iterdir()
             if ".array_record" in file.name}  # fmt: skip
    if not names:
        raise DatasetError(
            f"{path} is a data set of tfds without array_record files; others need TensorFlow. "
            "array_record fits. Prepare it again with: tfds build --file_format array_record"
        )
    return {name: path for name in sorted(names, key=_place)}


def _same(name: str, other: str) -> bool:
    return name in _SAME and other in _SAME


def _place(name: str) -> tuple[int, str]:
    """For sorting: splits in the order of their use."""
    order = ("train", *_SAME, "test")
    return order.index(name) if name in order else len(order), name


class SequenceSource:
    """Entries of `rows`, anything with a length and numbered entries: `Record`s or mappings.

    A `datasets.Dataset` of Hugging Face is one; of a `DatasetDict` take a split. `reader` makes a
    record of a mapping; without, its "image", "prefix" and "suffix" are taken. `name` goes into
    the ids. Raises DatasetError for what has no length, and for nothing.
    """

    def __init__(self, rows: Any, reader: Reader | None = None, name: str = "record"):
        if isinstance(rows, Mapping):
            raise DatasetError(
                f"A mapping with the keys {', '.join(map(str, list(rows)[:6]))} has no numbered "
                "records. A list of records, or one split of a dataset, fits. Take a split, for "
                "example: dataset['train']"
            )
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise DatasetError(
                f"{type(rows).__name__} has no length or no numbered entries. A list, or a dataset "
                "that is not streamed, fits. Call list(...), or load it without streaming=True"
            )
        if not len(rows):
            raise DatasetError(
                "There are no records. At least one fits. Check how the list was made."
            )
        self.rows = rows
        self.reader = reader or Fields()
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        index = check_number(index, len(self), self.name)
        place = f"{self.name}:{index}"
        try:
            row = self.rows[index]
        except Exception as e:  # a dataset that decodes pictures fails with whatever they hold
            raise DatasetError(
                f"{place} cannot be read: {type(e).__name__}: {e}. A readable record fits. Leave "
                "it out, or mend its picture."
            ) from e
        if isinstance(row, Record):
            return row
        if not isinstance(row, Mapping):
            raise DatasetError(
                f"{place} is {type(row).__name__}. A Record or a dict fits, such as "
                "{'image': 'cat.jpg', 'prefix': 'caption en', 'suffix': 'a cat'}."
            )
        try:
            return self.reader(row, place)
        except DatasetError as e:
            raise DatasetError(f"{place}: {e}") from e

    def __repr__(self) -> str:
        return f"SequenceSource({type(self.rows).__name__} of {len(self)}, name={self.name!r})"
