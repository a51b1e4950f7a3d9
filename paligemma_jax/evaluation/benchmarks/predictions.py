"""Predictions in a file that grows line by line, so that a run that stopped goes on."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.errors import ConfigError, DatasetError

PREDICTIONS, SETTINGS = "predictions.jsonl", "run.json"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model answered to one question.

    `logprob` is of all its tokens together (nats; None from beam search), `tokens` their number.
    `objects` are the boxes, where they were asked for: label, box (pixels) and score. `error` says
    why there is no answer.
    """

    id: str | int
    text: str = ""
    logprob: float | None = None
    tokens: int = 0
    objects: tuple[Mapping[str, Any], ...] | None = None
    error: str | None = None


class PredictionFile:
    """predictions.jsonl in a folder, with the settings that made it beside it in run.json.

    Processes that share a run write a file each, such as predictions.0-of-2.jsonl. Raises
    ConfigError where the folder has predictions of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], share: tuple[int, int] = (0, 1)):
        number, count = share
        own = PREDICTIONS if count == 1 else f"predictions.{number}-of-{count}.jsonl"
        self.path = folder / own
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / SETTINGS
        if kept.exists():
            _check_same(kept, settings)
        else:
            write_whole(kept, json.dumps(dict(settings), indent=1, ensure_ascii=False) + "\n")
        _cut_last_line(self.path)
        self.done: dict[str | int, Prediction] = {}
        self.read_again()

    def read_again(self) -> None:
        """Takes in what all processes have written by now."""
        for path in sorted(self.path.parent.glob("predictions*.jsonl")):
            self.done |= {one.id: one for one in _read(path)}

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Writes them so that they outlast the process."""
        new = list(predictions)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in new
            )
            file.flush()
            os.fsync(file.fileno())
        self.done |= {one.id: one for one in new}


def _cut_last_line(path: Path) -> None:
    """Takes off what was half written when the process ended."""
    if path.exists():
        lines = path.read_bytes().split(b"\n")
        if lines[-1]:
            write_whole(path, b"\n".join([*lines[:-1], b""]).decode())


def _read(path: Path) -> list[Prediction]:
    # Another process may be writing its last line.
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        rows = [json.loads(line) for line in lines if line]
        return [Prediction(**row | {"objects": _tuple(row["objects"])}) for row in rows]
    except (ValueError, TypeError, KeyError) as e:
        raise DatasetError(
            f"{path} holds a line that is no prediction: {e}. Lines that paligemma eval "
            "wrote fit. Remove the file, or choose another folder: --out FOLDER"
        ) from e


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never there in part."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _tuple(values: Any) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _check_same(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    different = [
        f"{name} was {kept.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted({*kept, *settings})
        if kept.get(name) != settings.get(name)
    ]
    if different:
        raise ConfigError(
            f"{path.parent} holds predictions of other settings: {'; '.join(different)}. The same "
            "settings go on where it stopped. Choose another folder: --out FOLDER"
        )
