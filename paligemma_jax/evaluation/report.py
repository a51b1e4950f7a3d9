"""report.html: a run beside the published figure, with its best and worst examples.

Small pictures of examples, with what was found and what is right drawn on them.

Where the errors of a run lie: by answer given, by confidence, by length.
"""

import base64
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.drawing import draw_boxes, label_colours, overlay_masks
from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.evaluation.detection_metrics import TrueBoxes
from paligemma_jax.evaluation.evaluate import Evaluation, definition, right_answer, write_whole
from paligemma_jax.evaluation.examples import Example, open_picture
from paligemma_jax.evaluation.metric import ByFigure
from paligemma_jax.evaluation.tasks import Answer, found_mask, found_masks
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.location_tokens import Box
from paligemma_jax.processing.masks import MaskCodec

_SIDE = 320  # pixels
_SHOWN = 4  # pictures of one question


def pictures_of(done: Evaluation, example: Example, codec: MaskCodec | None) -> str:
    """HTML of the example's pictures: what was found, and beside it what is right."""
    try:
        images = [open_picture(picture) for picture in example.images[:_SHOWN]]
    except PaliGemmaError as e:
        return f"<p>{html.escape(str(e))}</p>"
    answer = example.answer or done.benchmark.answer
    made, right = done.predictions[example.id], right_answer(example)
    if answer is Answer.BOXES:
        found = [(one["label"], one["box"], one["score"]) for one in made.objects or ()]
        truth: TrueBoxes = right
        boxes = [(label, box, None) for label, box in zip(truth.labels, truth.xyxy, strict=True)]
        images = [_boxes(images[0], found), _boxes(images[0], boxes)]
    elif answer is Answer.MASK and codec is not None:
        one = found_mask(made.text, codec, *right.mask.shape)
        images = [
            _masks(images[0], () if one is None else [one.mask]), _masks(images[0], [right.mask])
        ]  # fmt: skip
    elif answer is Answer.MASKS and codec is not None:
        masks = found_masks(made.text, codec, *right.shape[1:])
        images = [_masks(images[0], masks), _masks(images[0], right)]
    words = ["found", "right"] if answer is not Answer.TEXT else [""] * len(images)
    return "".join(_figure(image, word) for image, word in zip(images, words, strict=True))


def _boxes(image: Image.Image, objects: Sequence[tuple[str, Any, float | None]]) -> Image.Image:
    width, height = image.size
    boxes = tuple(
        Box(label, y1 / height, x1 / width, y2 / height, x2 / width)
        for label, (x1, y1, x2, y2), _ in objects
    )
    scores = tuple(score for _, _, score in objects if score is not None)
    kept = scores if len(scores) == len(boxes) and scores else None
    return draw_boxes(image, Detections(boxes, "", width, height, kept))


def _masks(image: Image.Image, masks: Sequence[np.ndarray] | np.ndarray) -> Image.Image:
    fitting = [mask for mask in masks if mask.shape == image.size[::-1]]
    if not fitting:
        return image
    line = max(1, round(min(image.size) / 200))
    colour = label_colours(["mask"])["mask"]
    return overlay_masks(image, fitting, [colour] * len(fitting), line)


def _figure(image: Image.Image, words: str) -> str:
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    code = base64.b64encode(buffer.getvalue()).decode()
    caption = f"<figcaption>{words}</figcaption>" if words else ""
    return (
        f"<figure><img alt='{words or 'picture'}' src='data:image/jpeg;base64,{code}'>"
        f"{caption}</figure>"
    )


_BINS = 10
Bin = tuple[str, float, float, int]  # name, mean confidence or length, mean score, examples


def confusion(done: Evaluation) -> dict[str, dict[str, int]] | None:
    """How often each right answer (first key) was given each: None unless all are yes or no."""
    counts = {right: {given: 0 for given in ("yes", "no", "other")} for right in ("yes", "no")}
    for example in done.examples:
        right = str(right_answer(example)).strip().lower()
        if done.benchmark.answer is not Answer.TEXT or right not in counts:
            return None
        made = done.predictions[example.id]
        if made.error is None:
            given = made.text.strip().lower()
            counts[right][given if given in ("yes", "no") else "other"] += 1
    return counts


def by_confidence(done: Evaluation) -> list[Bin]:
    """Ten bins of the probability of the whole answer; empty where answers have none."""

    def probability(id: str | int) -> float | None:
        logprob = done.predictions[id].logprob
        return None if logprob is None else math.exp(min(0.0, logprob))

    bins = _gather(done, probability, lambda value: min(int(value * _BINS), _BINS - 1))
    return [(f"{b / _BINS:.1f}-{(b + 1) / _BINS:.1f}", v, s, n) for b, v, s, n in bins]


def by_length(done: Evaluation) -> list[Bin]:
    """By the number of words of the answer: 0, 1, 2, 3-4, 5-8, ...; boxes and masks are none."""
    text = {e.id for e in done.examples if (e.answer or done.benchmark.answer) is Answer.TEXT}

    def words(id: str | int) -> float | None:
        return None if id not in text else float(len(done.predictions[id].text.split()))

    bins = _gather(done, words, lambda n: 0 if n == 0 else 1 + math.ceil(math.log2(n)))
    names = {0: "0", 1: "1", 2: "2"}
    spans = {b: f"{2 ** (b - 2) + 1}-{2 ** (b - 1)}" for b, *_ in bins if b > 2}
    return [((names | spans)[b], value, score, count) for b, value, score, count in bins]


def _gather(
    done: Evaluation,
    value_of: Callable[[str | int], float | None],
    bin_of: Callable[[float], int],
) -> list[tuple[int, float, float, int]]:
    gathered: dict[int, list[tuple[float, float]]] = {}
    for id, score in done.metric.scores.items():
        value = value_of(id)
        if value is not None and math.isfinite(score):
            gathered.setdefault(bin_of(value), []).append((value, score))
    return [
        (place, sum(v for v, _ in rows) / len(rows), sum(s for _, s in rows) / len(rows), len(rows))
        for place, rows in sorted(gathered.items())
    ]


REPORT = "report.html"
_MOST_FIGURES = 60
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


def write_report(
    done: Evaluation,
    folder: Path,
    *,
    model: str = "",
    codec: MaskCodec | None = None,
    examples: int = 8,
) -> Path:
    """Writes report.html with `examples` best and as many worst ones, and returns its path."""
    benchmark, main = done.benchmark, done.main
    title = f"{benchmark.title}: {model}" if model else benchmark.title
    scores = done.metric.scores
    worst, best = _chosen(done, examples, 1), _chosen(done, examples, -1)
    counted, left_out = int(done.counts["num"]), done.metric.left_out
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1><p>{_text(benchmark.source)}. {counted:,} questions"
        + (f", {len(left_out):,} left out" if left_out else "")
        + f". {_text(benchmark.notes)}</p>",
        f"<h2>{_text(benchmark.measured.main)}</h2>",
        _table(
            ["", "figure", "95 % interval"],
            [
                [model or "this run", f"{main.value:.2f}", f"{main.low:.2f} to {main.high:.2f}"],
                *[[n, f"{v:.2f}", "published"] for n, v in benchmark.published.items()],
            ],
        ),
        "<h2>Every figure</h2>",
        _figures(done),
        f"<details><summary>How it is measured</summary><pre>{_text(definition(done))}</pre>"
        "</details>",
        *_breakdown(done),
        "<h2>Worst</h2>",
        *[_example(done, example, scores[example.id], codec) for example in worst],
        "<h2>Best</h2>",
        *[_example(done, example, scores[example.id], codec) for example in best],
    ]
    if left_out:
        rows = [[str(id), reason] for id, reason in left_out.items()]
        parts += ["<h2>Left out</h2>", _table(["id", "why"], rows)]
    path = folder / REPORT
    write_whole(path, "\n".join([*parts, "</body></html>", ""]))
    return path


def _chosen(done: Evaluation, count: int, sign: int) -> list[Example]:
    """The worst (sign 1) or best (-1); of figures with questions of their own, some of each."""
    scores, by_id = done.metric.scores, {example.id: example for example in done.examples}
    # Stable: of equal scores, the first questions.
    ranked = [by_id[id] for id in sorted(scores, key=lambda id: sign * scores[id])]
    if not isinstance(done.metric, ByFigure):
        return ranked[:count]
    groups: dict[str, list[Example]] = {name: [] for name in done.metric.metrics}
    for example in ranked:
        groups[example.reference.group].append(example)
    each = max(1, count // len(groups))
    return [example for group in groups.values() for example in group[:each]]


def _figures(done: Evaluation) -> str:
    card, scale = done.benchmark.card, done.benchmark.scale
    heads = ["figure", "value", "95 % interval", *(["the model's card"] if card else [])]
    rows = []
    for name, f in list(done.figures.items())[:_MOST_FIGURES]:
        on_card = [f"{card[name] / scale:.3f}"] if name in card else [""] if card else []
        rows.append([name, f"{f.value:.4f}", f"{f.low:.4f} to {f.high:.4f}", *on_card])
    return _table(heads, rows)


def _breakdown(done: Evaluation) -> list[str]:
    parts = []
    counts = confusion(done)
    if counts is not None:
        rows = [[right, *[str(n) for n in given.values()]] for right, given in counts.items()]
        parts += [
            "<h2>Right answer and answer given</h2>",
            _table(["", "yes", "no", "other"], rows),
        ]
    confidences = by_confidence(done)
    if confidences:
        parts += [
            "<h2>Reliability: score by probability of the answer</h2>",
            _bars("probability", "mean probability", confidences),
        ]
    if done.benchmark.answer is Answer.TEXT:
        parts += [
            "<h2>Score by length of the answer</h2>",
            _bars("words", "mean length", by_length(done)),
        ]
    return parts


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


def _example(done: Evaluation, example: Example, score: float, codec: MaskCodec | None) -> str:
    right = right_answer(example)
    rows = [["prompt", example.prompt], ["answer", done.predictions[example.id].text]]
    if (example.answer or done.benchmark.answer) is Answer.TEXT:
        rows.append(["right", right if isinstance(right, str) else _json(right)])
    rows.append(["score", f"{score:.3f}"])
    return (
        f"<div class='example'><h3>{_text(str(example.id))}</h3>"
        f"{pictures_of(done, example, codec)}{_table([], rows)}</div>"
    )


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(value: str) -> str:
    return html.escape(value)
