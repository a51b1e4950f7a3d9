"""Rows as the public builders prepare them, through tfds' own features, to the record."""

import dataclasses
import io
import re
import runpy
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.object_readers import Referring
from paligemma_jax.data.record import Record
from paligemma_jax.data.sources import decoders_of, plain_example
from paligemma_jax.processing.image import load_image
from paligemma_jax.training.config import Data, TrainConfig, config_directory, load_config
from tests.data.builders import BUILT, Built
from tests.data.conftest import FakeCodec

WITHOUT = {  # a public builder
    "nlvr2", "ocrvqa", "activitynet_cap", "activitynet_qa", "msrvtt_cap", "msrvtt_qa", "msvd_qa",
    "vatex_cap", "longcap100", "longcap100_l4",
}  # fmt: skip


def read(name: str, arg: str = "") -> TrainConfig:
    return TrainConfig.from_config(load_config(f"transfers:task={name},root=DATA,{arg}"))


def places(config: TrainConfig) -> list[Data]:
    return list(config.train if isinstance(config.train, tuple) else (config.train,))


def png(pixels: np.ndarray) -> io.BytesIO:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    out.seek(0)
    return out


def feature(features: Any, kind: Any) -> Any:
    if isinstance(kind, dict):
        return features.Sequence({name: feature(features, one) for name, one in kind.items()})
    if isinstance(kind, list):
        return features.Sequence(feature(features, kind[0]))
    if isinstance(kind, tuple):
        return features.ClassLabel(names=kind)
    return {
        "text": features.Text(),
        "texts": features.Sequence(features.Text()),
        "int": features.Scalar(np.int64),
        "bool": features.Scalar(np.bool_),
        "float": features.Scalar(np.float32),
        "image": features.Image(encoding_format="png"),
        "box": features.BBoxFeature(),
        "bools10": features.Tensor(shape=[10], dtype=np.bool_),
    }[kind]


def value(features: Any, kind: Any, given: Any = None) -> Any:
    """What is given, and anything that fits where nothing is."""
    if isinstance(kind, dict):
        rows = given or [{}]
        return [{name: value(features, one, row.get(name)) for name, one in kind.items()}
                for row in rows]  # fmt: skip
    if given is not None:
        return given
    if isinstance(kind, list | tuple):
        return [] if isinstance(kind, list) else kind[0]
    if kind == "image":
        mask = np.zeros((20, 30), bool)
        mask[5:15, 3:12] = True
        return png(mask)
    if kind == "box":
        return features.BBox(ymin=0.25, xmin=0.1, ymax=0.75, xmax=0.4)
    return {"text": "anything", "texts": ["anything"], "bools10": np.ones(10, bool)}.get(kind, 0)


def prepared(built: Built, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A row after it was written and read by tfds, as a reader gets it."""
    tfds = pytest.importorskip("tensorflow_datasets", reason='needs the extra "data"')
    from tensorflow_datasets.core.features.feature import TensorInfo

    # To write lists in lists, tfds asks TensorFlow what NumPy's types are called.
    monkeypatch.setattr(TensorInfo, "dtype", property(lambda info: info.np_dtype))
    kinds, features = built.columns, tfds.features
    shape = features.FeaturesDict({name: feature(features, kind) for name, kind in kinds.items()})
    row = {name: value(features, kind, built.row.get(name)) for name, kind in kinds.items()}
    if "image" in kinds:
        row["image"] = png(np.zeros((20, 30, 3), np.uint8))
    written = shape.serialize_example(shape.encode_example(row))
    return plain_example(shape.deserialize_example_np(written, decoders=decoders_of(shape)), shape)


def read_row(name: str, row: dict[str, Any]) -> tuple[Record, TrainConfig]:
    config = read(name)
    reader = next(one for one in places(config) if one.split.endswith("en") or name != "coco35l")
    made = reader.reader
    if isinstance(made, Referring):
        made = dataclasses.replace(made, codec=FakeCodec())
    assert made is not None
    return made(row, "train:0"), config


@pytest.mark.parametrize("name", BUILT)
def test_what_is_trained_from_a_row(name: str, monkeypatch: pytest.MonkeyPatch):
    built = BUILT[name]
    record, config = read_row(name, prepared(built, monkeypatch))
    assert (record.prefix, list(record.answers or (record.suffix,))) == (
        built.prefix, built.answers,
    )  # fmt: skip
    assert [load_image(image).size for image in record.images] == [
        (224, 224) if name == "widgetcap" else (30, 20)
    ]
    rng = np.random.default_rng(0)
    trained = set()
    for epoch in range(20):
        changed = dataclasses.replace(record, epoch=epoch)
        for transform in config.transforms:
            changed = transform(changed, rng)
        trained.add(changed.suffix)
        assert changed.prefix == built.prefix or name == "science_qa"
        assert not changed.answers
    assert trained == set(built.trained or built.answers)


@pytest.mark.parametrize("name", BUILT)
def test_directories_and_splits(name: str):
    built = BUILT[name]
    published = places(read(name, "final_split=True"))
    found = [*places(read(name)), *published, read(name).validation]
    assert [one.path for one in published[: len(built.directories.split())]] == [
        f"DATA/{directory}" for directory in built.directories.split()
    ]
    names = {part for one in found for part in re.findall(r"[a-z][\w-]*", one.split)}
    if name == "coco35l":
        assert len(published) == 35
        names = {"train_en", "dev_en"} if {"train_en", "dev_en", "train_de"} <= names else names
    assert names <= set(built.splits.split())


def test_every_transfer_is_of_a_builder_or_known_to_have_none():
    transfers = runpy.run_path(str(config_directory() / "transfers.py"))["TRANSFERS"]
    assert set(transfers) == set(BUILT) | WITHOUT and not set(BUILT) & WITHOUT


def test_lines_with_tokens_are_read_as_they_are():
    config = read("refcoco_seg", "data=mine/train.jsonl")
    line = {"image": "a.jpg", "prefix": "left cat", "suffix": "<loc0001>"}
    (data,) = places(config)
    assert not data.masks and data.reader is not None
    assert data.reader(line, "x").suffix == "<loc0001>"
    (data,) = places(read("refcoco_seg"))
    assert data.masks
