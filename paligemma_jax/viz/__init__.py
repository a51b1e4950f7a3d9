"""Pictures of results."""

from paligemma_jax.viz.boxes import draw as draw
from paligemma_jax.viz.boxes import draw_boxes as draw_boxes
