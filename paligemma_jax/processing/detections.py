"""Detected objects of one picture, in its own pixels."""

import dataclasses
from typing import Any

import numpy as np

from paligemma_jax.processing.parsing import Box, parse_boxes


@dataclasses.dataclass(frozen=True)
class Detections:
    """Boxes in one picture; `text` is the answer as it came, width and height are pixels."""

    boxes: tuple[Box, ...]
    text: str
    width: int
    height: int

    @classmethod
    def from_text(cls, text: str, width: int, height: int) -> "Detections":
        """Reads every complete box of an answer about a picture of width x height pixels."""
        return cls(tuple(parse_boxes(text)), text, width, height)

    @property
    def labels(self) -> list[str]:
        """The label of each box; "" where the model gave none."""
        return [box.label for box in self.boxes]

    @property
    def xyxy(self) -> np.ndarray:
        """f32[n, 4] corners x1, y1, x2, y2 in pixels."""
        corners = [(box.x1, box.y1, box.x2, box.y2) for box in self.boxes]
        scale = np.array([self.width, self.height] * 2, np.float32)
        return np.array(corners, np.float32).reshape(-1, 4) * scale

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; boxes in pixels (x1, y1, x2, y2)."""
        boxes = [
            {"label": label, "box": [round(float(v), 1) for v in corners]}
            for label, corners in zip(self.labels, self.xyxy, strict=True)
        ]
        return {"width": self.width, "height": self.height, "objects": boxes, "text": self.text}

    def __len__(self) -> int:
        return len(self.boxes)

    def __str__(self) -> str:
        lines = [
            f"{label or 'object'}: " + " ".join(f"{v:.0f}" for v in corners)
            for label, corners in zip(self.labels, self.xyxy, strict=True)
        ]
        return "\n".join(lines) or "nothing found"
