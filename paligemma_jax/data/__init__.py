"""Training data: sources of records, changes made to them, batches, and a check of all of it."""

from paligemma_jax.data.bad_records import SkipBadRecords as SkipBadRecords
from paligemma_jax.data.bad_records import StopAtBadRecord as StopAtBadRecord
from paligemma_jax.data.batches import Batches as Batches
from paligemma_jax.data.batches import TrainBatch as TrainBatch
from paligemma_jax.data.batches import make_batches as make_batches
from paligemma_jax.data.box_layouts import XYWHPixels as XYWHPixels
from paligemma_jax.data.box_layouts import XYXYPixels as XYXYPixels
from paligemma_jax.data.box_layouts import YXYXFractions as YXYXFractions
from paligemma_jax.data.coco import CocoDetection as CocoDetection
from paligemma_jax.data.coco import CocoSegmentation as CocoSegmentation
from paligemma_jax.data.detecting import Detect as Detect
from paligemma_jax.data.detecting import Segment as Segment
from paligemma_jax.data.image_folder import ImageFolder as ImageFolder
from paligemma_jax.data.jsonl import JsonlSource as JsonlSource
from paligemma_jax.data.opening import find_splits as find_splits
from paligemma_jax.data.opening import open_source as open_source
from paligemma_jax.data.readers import Answer as Answer
from paligemma_jax.data.readers import Caption as Caption
from paligemma_jax.data.readers import Fields as Fields
from paligemma_jax.data.readers import Ocr as Ocr
from paligemma_jax.data.record import Record as Record
from paligemma_jax.data.record import RecordSource as RecordSource
from paligemma_jax.data.rows import RowSource as RowSource
from paligemma_jax.data.tfds import TfdsSource as TfdsSource
