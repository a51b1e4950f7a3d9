"""Reading parts of tensors, as far as the files let one: each process its own.

A box is a slice for each axis of a piece (see `Weights`).
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from paligemma_jax.weights.arrays import aligned_empty
from paligemma_jax.weights.source import Weights, piece_shapes

Box = tuple[slice, ...]


@runtime_checkable
class Sliceable(Protocol):
    """Weights of which any piece can be read without the others."""

    def read_box(self, name: str, number: int, box: Box, dtype: np.dtype) -> np.ndarray:
        """A part of one piece of a tensor; little more is read, or the piece at most.

        Raises CheckpointError.
        """
        ...


def read_boxes(
    weights: Weights, name: str, boxes: Sequence[Box | None], dtype: np.dtype
) -> Iterator[np.ndarray | None]:
    """A part of each piece of a tensor in turn, None where none is wanted; raises CheckpointError.

    Nothing of a piece is held when the next one is asked for. Weights with `sliceable` parts give
    them alone; others are read from the first piece to the last one that is wanted.
    """
    parts: Sliceable | None = getattr(weights, "sliceable", None)
    if parts is not None:
        for number, box in enumerate(boxes):
            yield None if box is None else parts.read_box(name, number, box, dtype)
        return
    shapes = piece_shapes(name, weights.specs[name].shape)
    wanted = [number for number, box in enumerate(boxes) if box is not None]
    fills = weights.pieces(name, dtype)
    for number, (shape, box) in enumerate(zip(shapes, boxes, strict=True)):
        if wanted and number <= wanted[-1]:
            piece = aligned_empty(shape, dtype)
            next(fills)(piece)  # also where it is not wanted: what follows it comes after it
            yield None if box is None else piece[box]
            del piece
        else:
            yield None
