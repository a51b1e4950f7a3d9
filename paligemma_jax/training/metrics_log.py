"""Where the numbers of a run go: metrics.jsonl; TensorBoard, Weights & Biases if wanted."""

import importlib.util
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from paligemma_jax.errors import MissingExtraError

METRICS = "metrics.jsonl"
_WANDB_ID = "wandb_id"


@runtime_checkable
class Writer(Protocol):
    """Takes the numbers of a step, and is closed at the end."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line and step: {"step": 10, "loss": 1.5}; NaN and infinities as text.

    A run that goes on from an earlier step drops the lines after it, so that no step comes twice.
    Every line is flushed: after a kill all but the last one are there.
    """

    def __init__(self, path: Path, after: int = 0):
        kept = [row for row in read_metrics(path) if row["step"] <= after]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(_line(row) for row in kept))
        os.replace(beside, path)
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(_line({"step": step, **values}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files for `tensorboard --logdir WORKDIR`; MissingExtraError without tensorboardX."""

    def __init__(self, directory: Path):
        if not self.installed():
            raise MissingExtraError("Writing for TensorBoard", "train")
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), flush_secs=30)

    @staticmethod
    def installed() -> bool:
        """Whether the package that writes the files is there."""
        return importlib.util.find_spec("tensorboardX") is not None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Reports to a project at wandb.ai, or to files alone with WANDB_MODE=offline.

    A run that goes on in `directory` is the same run there. MissingExtraError without wandb.
    """

    def __init__(self, directory: Path, project: str, settings: Mapping[str, str]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise MissingExtraError("Reporting to Weights & Biases", "wandb") from e
        name = directory / _WANDB_ID
        if not name.exists():
            name.write_text(uuid.uuid4().hex)
        options: dict[str, Any] = dict(project=project, config=dict(settings))
        self._run = wandb.init(
            dir=str(directory), id=name.read_text(), name=directory.name, resume="allow", **options
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that was cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows.append({"step": int(row.pop("step")), **{k: _number(v) for k, v in row.items()}})
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return rows


def _line(row: Mapping[str, Any]) -> str:
    # JSON has no NaN.
    plain = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(plain) + "\n"


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
