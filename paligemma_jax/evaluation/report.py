"""report.html: a run beside the published scores, where its errors lie, and its best and worst
examples with what was found and what is right drawn on their images.
"""

import base64
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.drawing import label_colors, overlay_masks
from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.evaluation.evaluate import (
    EvaluationResult,
    found_mask,
    found_masks,
    write_whole,
)
from paligemma_jax.evaluation.examples import Example, open_image
from paligemma_jax.processing.detections import Detections, draw_boxes
from paligemma_jax.processing.location_tokens import Box
from paligemma_jax.processing.masks import MaskCodec

REPORT = "report.html"
_SIDE = 320  # pixels of an image
_MAX_IMAGES = 4  # of one example
_MAX_SCORES = 60
_BINS = 10  # of confidence
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto;
       padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #eee;
         vertical-align: top; overflow-wrap: anywhere }
figure { display: inline-block; margin: .3rem .6rem .3rem 0 }
img { max-width: 20rem; border: 1px solid #ddd }
.example { border-top: 1px solid #ddd; padding: .6rem 0 }
.bar { background: #0072B2; height: .9rem }
pre { white-space: pre-wrap; background: #f7f7f7; padding: .8rem }
"""
Bin = tuple[str, float, float, int]  # name, mean confidence or length, mean score, examples


def write_report(
    done: EvaluationResult,
    folder: Path,
    *,
    model: str = "",
    codec: MaskCodec | None = None,
    examples: int = 8,
) -> Path:
    """Writes report.html with `examples` best and as many worst ones, and returns its path."""
    task, main, skipped = done.task, done.main, done.metric.skipped
    title = f"{task.task.title}: {model}" if model else task.task.title
    counted = f"{int(done.counts['num']):,} examples"
    counted += f", {len(skipped):,} skipped" if skipped else ""
    published = [[name, f"{value:.2f}", "published"] for name, value in task.published.items()]
    interval = f"{main.low:.2f} to {main.high:.2f}"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1><p>{_text(task.task.source)}. {counted}. {_text(task.notes)}</p>",
        f"<h2>{_text(task.main)}</h2>",
        _table(
            ["", "score", "95 % interval"],
            [[model or "this run", f"{main.value:.2f}", interval], *published],
        ),
        "<h2>All scores</h2>",
        _scores(done),
        "<details><summary>How it is measured</summary>"
        f"<pre>{_text(done.metric.definition)}</pre></details>",
        *_errors(done),
    ]
    scores = done.metric.example_scores
    for heading, sign in (("Worst", 1), ("Best", -1)):
        chosen = _chosen(done, scores, examples, sign)
        shown = [_example(done, one, scores[one.id], codec) for one in chosen]
        parts += [f"<h2>{heading}</h2>", *shown]
    if skipped:
        rows = [[str(id), reason] for id, reason in skipped.items()]
        parts += ["<h2>Skipped</h2>", _table(["id", "why"], rows)]
    path = folder / REPORT
    write_whole(path, "\n".join([*parts, "</body></html>", ""]))
    return path


def _chosen(
    done: EvaluationResult, scores: Mapping[str | int, float], count: int, sign: int
) -> list[Example]:
    """The worst (sign 1) or best (-1); where groups cannot be pooled, some of each."""
    by_id = {example.id: example for example in done.examples}
    # Stable: of equal scores, the first examples.
    ranked = [by_id[id] for id in sorted(scores, key=lambda id: sign * scores[id])]
    if done.metric.overall or not any(example.groups for example in ranked):
        return ranked[:count]
    groups: dict[str, list[Example]] = {}
    for example in ranked:
        groups.setdefault(example.groups[0], []).append(example)
    each = max(1, count // len(groups))
    return [example for _, group in sorted(groups.items()) for example in group[:each]]


def _scores(done: EvaluationResult) -> str:
    card, scale = done.task.model_card, done.task.scale
    heads = ["score", "value", "95 % interval", *(["model card"] if card else [])]
    rows = []
    for name, f in list(done.scores.items())[:_MAX_SCORES]:
        on_card = [f"{card[name] / scale:.3f}"] if name in card else [""] if card else []
        rows.append([name, f"{f.value:.4f}", f"{f.low:.4f} to {f.high:.4f}", *on_card])
    return _table(heads, rows)


def _errors(done: EvaluationResult) -> list[str]:
    parts = []
    counts = confusion(done)
    if counts is not None:
        rows = [[right, *[str(n) for n in given.values()]] for right, given in counts.items()]
        parts += [
            "<h2>Right answer and answer given</h2>",
            _table(["", "yes", "no", "other"], rows),
        ]
    for heading, name, value, bins in (
        ("Reliability: score by probability of the answer", "probability", "mean probability",
         by_confidence(done)),
        ("Score by length of the answer", "words", "mean length", by_length(done)),
    ):  # fmt: skip
        if bins:
            parts += [f"<h2>{heading}</h2>", _bars(name, value, bins)]
    return parts


def confusion(done: EvaluationResult) -> dict[str, dict[str, int]] | None:
    """How often each right answer (first key) was given each: None unless all are yes or no."""
    counts = {right: {given: 0 for given in ("yes", "no", "other")} for right in ("yes", "no")}
    for example in done.examples:
        right = str(example.reference).strip().lower()
        if done.output(example) != "text" or right not in counts:
            return None
        made = done.predictions[example.id]
        if made.error is None:
            given = made.text.strip().lower()
            counts[right][given if given in ("yes", "no") else "other"] += 1
    return counts


def by_confidence(done: EvaluationResult) -> list[Bin]:
    """Ten bins of the probability of the whole answer; empty where answers have none."""

    def probability(id: str | int) -> float | None:
        logprob = done.predictions[id].logprob
        return None if logprob is None else math.exp(min(0.0, logprob))

    bins = _binned(done, probability, lambda value: min(int(value * _BINS), _BINS - 1))
    return [(f"{b / _BINS:.1f}-{(b + 1) / _BINS:.1f}", v, s, n) for b, v, s, n in bins]


def by_length(done: EvaluationResult) -> list[Bin]:
    """By the number of words of the answer: 0, 1, 2, 3-4, 5-8, ...; boxes and masks are none."""
    text = {example.id for example in done.examples if done.output(example) == "text"}

    def words(id: str | int) -> float | None:
        return None if id not in text else float(len(done.predictions[id].text.split()))

    bins = _binned(done, words, lambda n: 0 if n == 0 else 1 + math.ceil(math.log2(n)))
    names = {0: "0", 1: "1", 2: "2"}
    spans = {b: f"{2 ** (b - 2) + 1}-{2 ** (b - 1)}" for b, *_ in bins if b > 2}
    return [((names | spans)[b], value, score, count) for b, value, score, count in bins]


def _binned(
    done: EvaluationResult,
    value_of: Callable[[str | int], float | None],
    bin_of: Callable[[float], int],
) -> list[tuple[int, float, float, int]]:
    """Of each bin: mean value, mean score, and how many."""
    members: dict[int, list[tuple[float, float]]] = {}
    for id, score in done.metric.example_scores.items():
        value = value_of(id)
        if value is not None and math.isfinite(score):
            members.setdefault(bin_of(value), []).append((value, score))
    return [(bin, *np.mean(m, axis=0).tolist(), len(m)) for bin, m in sorted(members.items())]


def _bars(name: str, value: str, bins: Sequence[Bin]) -> str:
    top = max([1e-9, *[score for _, _, score, _ in bins]])
    rows = "".join(
        f"<tr><td>{_text(label)}</td><td>{mean:.2f}</td><td>{score:.3f}</td>"
        f"<td style='width:16rem'><div class='bar' style='width:{max(0, score) / top:.1%}'></div>"
        f"</td><td>{count:,}</td></tr>"
        for label, mean, score, count in bins
    )
    heads = "".join(f"<th>{h}</th>" for h in (name, value, "mean score", "", "examples"))
    return f"<table><tr>{heads}</tr>{rows}</table>"


def _example(
    done: EvaluationResult, example: Example, score: float, codec: MaskCodec | None
) -> str:
    right = example.reference
    rows = [["prompt", example.prompt], ["answer", done.predictions[example.id].text]]
    if done.output(example) == "text":
        words = json.dumps(right, ensure_ascii=False, default=str)
        rows.append(["right", right if isinstance(right, str) else words])
    rows.append(["score", f"{score:.3f}"])
    images = _images(done, example, codec)
    title = f"<h3>{_text(str(example.id))}</h3>"
    return f"<div class='example'>{title}{images}{_table([], rows)}</div>"


def _images(done: EvaluationResult, example: Example, codec: MaskCodec | None) -> str:
    """HTML of the example's images: what was found, and beside it what is right."""
    try:
        images = [open_image(image) for image in example.images[:_MAX_IMAGES]]
    except PaliGemmaError as e:
        return f"<p>{_text(str(e))}</p>"
    output, made, right = done.output(example), done.predictions[example.id], example.reference
    if output == "boxes":
        found = [(one["label"], one["box"], one["score"]) for one in made.objects or ()]
        true = [(label, box, None) for label, box in zip(right.labels, right.xyxy, strict=True)]
        images = [_with_boxes(images[0], found), _with_boxes(images[0], true)]
    elif output == "mask" and codec is not None:
        one = found_mask(made.text, codec, *right.mask.shape)
        masks = () if one is None else [one.mask]
        images = [_with_masks(images[0], masks), _with_masks(images[0], [right.mask])]
    elif output == "masks" and codec is not None:
        masks = found_masks(made.text, codec, *right.shape[1:])
        images = [_with_masks(images[0], masks), _with_masks(images[0], right)]
    captions = ["found", "right"] if output != "text" else [""] * len(images)
    return "".join(_figure(image, words) for image, words in zip(images, captions, strict=False))


def _with_boxes(
    image: Image.Image, objects: Sequence[tuple[str, Any, float | None]]
) -> Image.Image:
    width, height = image.size
    boxes = tuple(
        Box(label, y1 / height, x1 / width, y2 / height, x2 / width)
        for label, (x1, y1, x2, y2), _ in objects
    )
    scores = tuple(score for _, _, score in objects if score is not None)
    kept = scores if len(scores) == len(boxes) and scores else None
    return draw_boxes(image, Detections(boxes, "", width, height, kept))


def _with_masks(image: Image.Image, masks: Sequence[np.ndarray] | np.ndarray) -> Image.Image:
    same_size = [mask for mask in masks if mask.shape == image.size[::-1]]
    if not same_size:
        return image
    line = max(1, round(min(image.size) / 200))
    color = label_colors(["mask"])["mask"]
    return overlay_masks(image, same_size, [color] * len(same_size), line)


def _figure(image: Image.Image, words: str) -> str:
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    code = base64.b64encode(buffer.getvalue()).decode()
    caption = f"<figcaption>{words}</figcaption>" if words else ""
    source = f"data:image/jpeg;base64,{code}"
    return f"<figure><img alt='{words or 'image'}' src='{source}'>{caption}</figure>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(value: str) -> str:
    return html.escape(value)
