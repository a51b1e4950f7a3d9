"""Predictions as the servers of VQAv2, DocVQA, VizWiz and GQA take them."""

import json
from pathlib import Path
from typing import Any

from paligemma_jax.evaluation.benchmarks.evaluate import Evaluation
from paligemma_jax.evaluation.benchmarks.predictions import write_whole

# The keys of the question and of the answer; VizWiz's questions are named by their picture.
_KEYS = {
    "vqav2": ("question_id", "answer"),
    "textvqa": ("question_id", "answer"),
    "docvqa": ("questionId", "answer"),
    "infovqa": ("questionId", "answer"),
    "stvqa": ("question_id", "answer"),
    "vizwizvqa": ("image", "answer"),
    "gqa": ("questionId", "prediction"),
}


def server_rows(done: Evaluation) -> list[dict[str, Any]] | None:
    """One object a question in the order of the data; None for tasks without a server.

    Ids of VQAv2, TextVQA, DocVQA, InfographicVQA and ST-VQA that are digits become numbers. A
    question that was left out is answered with "".
    """
    keys = _KEYS.get(done.benchmark.name)
    if keys is None:
        return None
    question, answer = keys
    rows = []
    for example in done.examples:
        id: Any = example.images[0].name if question == "image" else example.id
        if isinstance(id, str) and id.isdecimal() and done.benchmark.name != "gqa":
            id = int(id)
        rows.append({question: id, answer: done.predictions[example.id].text})
    return rows


def write_server_file(done: Evaluation, folder: Path) -> Path | None:
    """Writes server.json, and returns its path; nothing for tasks without a server."""
    rows = server_rows(done)
    if rows is None:
        return None
    path = folder / "server.json"
    write_whole(path, json.dumps(rows, ensure_ascii=False) + "\n")
    return path
