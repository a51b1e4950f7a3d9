"""Data sets prepared by TensorFlow Datasets, written and read here without TensorFlow."""

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.object_readers import ObjectReader
from paligemma_jax.data.readers import Fields
from paligemma_jax.data.sources import TfdsSource, open_source
from paligemma_jax.data.tasks import PromptReader
from paligemma_jax.errors import DatasetError
from paligemma_jax.processing.image import load_image


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((10, 20, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def build(tfds: Any, directory: Path) -> Path:
    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["cat", "dog"])
            things = {"bbox": tfds.features.BBoxFeature(), "category": label}
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(None, None, 3)),
                        "prefix": tfds.features.Text(),
                        "suffix": tfds.features.Text(),
                        "captions": tfds.features.Sequence(tfds.features.Text()),
                        "label": label,
                        "objects": tfds.features.Sequence(things),
                    }
                )
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(5), "validation": self._generate_examples(2)}

        def _generate_examples(self, count):
            box = tfds.features.BBox(ymin=0.1, xmin=0.2, ymax=0.5, xmax=1.0)
            for i in range(count):
                yield (
                    i,
                    {
                        "image": io.BytesIO(png(i)),
                        "prefix": f"answer en {i}?",
                        "suffix": "größer",
                        "captions": ["one", "two"],
                        "label": i % 2,
                        "objects": [{"bbox": box, "category": 1}],
                    },
                )

    builder = Pets(data_dir=directory, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = 'needs the extra "data"'
    tfds = pytest.importorskip("tensorflow_datasets", reason=reason)
    pytest.importorskip("array_record", reason=reason)
    return build(tfds, tmp_path_factory.mktemp("tfds"))


def test_records(prepared: Path):
    source = open_source(prepared)
    assert isinstance(source, TfdsSource) and len(source) == 5
    records = [source[i] for i in range(5)]
    first = min(records, key=lambda record: record.prefix)
    assert first.prefix == "answer en 0?" and first.suffix == "größer"
    assert first.images == (png(0),) and load_image(first.images[0]).size == (20, 10)
    assert len({record.id for record in records}) == 5
    assert pickle.loads(pickle.dumps(source))[0] == source[0]
    assert len(open_source(prepared, "val")) == 2
    assert "tensorflow" not in sys.modules


def test_readers(prepared: Path):
    assert TfdsSource(prepared, reader=PromptReader("caption en", "captions"))[0].answers == (
        "one",
        "two",
    )
    named = TfdsSource(prepared, reader=Fields(suffix="label"))
    assert {named[i].suffix for i in range(5)} == {"cat", "dog"}
    boxes = TfdsSource(
        prepared, reader=ObjectReader(classes=("cat", "dog"), box_format="rel_yxyx")
    )[0]
    assert boxes.prefix == "detect cat ; dog"
    assert boxes.suffix == "<loc0102><loc0205><loc0512><loc1023> dog"
    assert boxes.size == (20, 10)


def test_splits_in_part_and_unknown_ones(prepared: Path):
    assert len(TfdsSource(prepared, "train[:40%]")) == 2
    assert len(open_source(prepared, "train[:40%]+validation")) == 4
    with pytest.raises(DatasetError, match="cannot be read"):
        open_source(prepared, "nonsense")
    with pytest.raises(DatasetError, match="train:0: the field 'question' is missing"):
        TfdsSource(prepared, reader=Fields(prefix="question"))[0]
    with pytest.raises(DatasetError, match="no dataset_info.json"):
        TfdsSource(prepared.parent)


def test_damaged_files_are_noticed(prepared: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in prepared.iterdir():
        data = bytearray(file.read_bytes())
        if "train.array_record" in file.name:
            written = [place for place, value in enumerate(data) if value]
            data[written[len(written) // 2]] ^= 0x10
        (copy / file.name).write_bytes(data)

    def read() -> list[Any]:
        source = TfdsSource(copy)
        return [source[i] for i in range(len(source))]

    with pytest.raises(DatasetError, match="cannot be read"):
        read()
