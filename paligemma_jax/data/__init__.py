"""Training data: sources of records, changes made to them, batches, and a check of all of it."""

from paligemma_jax.data.bad_records import SkipBadRecords as SkipBadRecords
from paligemma_jax.data.bad_records import StopAtBadRecord as StopAtBadRecord
from paligemma_jax.data.batches import Batches as Batches
from paligemma_jax.data.batches import TrainBatch as TrainBatch
from paligemma_jax.data.batches import make_batches as make_batches
from paligemma_jax.data.image_folder import ImageFolder as ImageFolder
from paligemma_jax.data.jsonl import JsonlSource as JsonlSource
from paligemma_jax.data.readers import Answer as Answer
from paligemma_jax.data.readers import Caption as Caption
from paligemma_jax.data.readers import Fields as Fields
from paligemma_jax.data.readers import Ocr as Ocr
from paligemma_jax.data.record import Record as Record
from paligemma_jax.data.record import RecordSource as RecordSource
from paligemma_jax.data.rows import RowSource as RowSource
