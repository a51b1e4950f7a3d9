"""supervision reads what the demo model finds: as its own type, and from the answer's text."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.demo.render import render
from paligemma_jax.demo.showcase import showcase

pytestmark = pytest.mark.parity
sv = pytest.importorskip("supervision")


SIZE = 320, 224


@pytest.fixture(scope="module")
def pali() -> pg.Pipeline:
    return pg.from_pretrained("demo", dtype="float32")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(render(showcase(seed=7).scene, 448)).resize(SIZE)


def test_boxes_both_ways(pali: pg.Pipeline, picture: Image.Image):
    found = pali.detect(picture, "square")
    theirs = found.to_supervision(["circle", "square"])
    assert len(theirs) == len(found) > 1 and set(theirs.class_id) == {1}
    np.testing.assert_array_equal(theirs.xyxy, found.xyxy)
    assert found.scores is not None
    np.testing.assert_allclose(theirs.confidence, found.scores, rtol=1e-6)
    read: Any = sv.Detections.from_vlm(
        sv.VLM.PALIGEMMA, found.text, resolution_wh=SIZE, classes=["circle", "square"]
    )
    assert read.data["class_name"].tolist() == found.labels
    np.testing.assert_array_equal(read.class_id, theirs.class_id)
    # They divide locations by 1024 and we by 1023, where the last one is the picture's edge.
    np.testing.assert_allclose(read.xyxy, found.xyxy, atol=max(SIZE) / 1023)
    metric = sv.metrics.MeanAveragePrecision()
    assert metric.update([theirs], [read]).compute().map75 == pytest.approx(1)


def test_masks_are_drawn(pali: pg.Pipeline, picture: Image.Image):
    found = pali.segment(picture, "circle")
    theirs = found.to_supervision()
    np.testing.assert_array_equal(theirs.mask, found.masks)
    assert theirs.mask.shape[1:] == SIZE[::-1] and theirs.mask.any(axis=(1, 2)).all()
    drawn = sv.MaskAnnotator(opacity=1).annotate(np.asarray(picture).copy(), theirs)
    changed = (drawn != np.asarray(picture)).any(axis=-1)
    np.testing.assert_array_equal(changed, theirs.mask.any(axis=0))
