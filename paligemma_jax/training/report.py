"""report.html: one page about a run, with its curve, its settings and its last answers."""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from paligemma_jax.training.curve import draw_curve

REPORT, CURVE, SAMPLES = "report.html", "loss.png", "samples.png"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem }
img { max-width: 100%; border: 1px solid #ddd }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #eee;
         vertical-align: top; overflow-wrap: anywhere }
"""


def write_report(
    workdir: Path,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, str],
    outcome: Mapping[str, str],
) -> None:
    """Writes loss.png and report.html from the rows of metrics.jsonl; whole files or none.

    `outcome` are lines about how the run went; samples.png is shown if it is there.
    """
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    checked = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    curve = draw_curve(training, checked)
    _replace(workdir / CURVE, _png(curve))
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(workdir.name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(workdir.name)}</h1>",
        _table(outcome),
        f"<h2>Loss</h2>{_picture(_png(curve), 'loss by step')}",
        "<h2>Last values</h2>",
        _table({name: _number(value) for name, value in last.items()}),
    ]
    samples = workdir / SAMPLES
    if samples.exists():
        parts.append("<h2>Answers to validation records</h2>")
        parts.append(_picture(samples.read_bytes(), "pictures with prompts and answers"))
    parts += ["<h2>Settings</h2>", _table(settings), "</body></html>"]
    _replace(workdir / REPORT, "\n".join(parts).encode())


def save_picture(path: Path, picture: Image.Image) -> None:
    """Writes a PNG beside `path`, then renames it."""
    _replace(path, _png(picture))


def _table(rows: Mapping[str, str]) -> str:
    lines = [
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
    ]
    return f"<table>{''.join(lines)}</table>"


def _number(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _picture(data: bytes, words: str) -> str:
    code = base64.b64encode(data).decode()
    return f"<img alt='{html.escape(words)}' src='data:image/png;base64,{code}'>"


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(data)
    os.replace(beside, path)
