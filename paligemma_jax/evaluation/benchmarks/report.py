"""report.html: a run beside the published figure, with its best and worst examples."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from paligemma_jax.evaluation.benchmarks.benchmark import Answer
from paligemma_jax.evaluation.benchmarks.breakdown import Bin, by_confidence, by_length, confusion
from paligemma_jax.evaluation.benchmarks.evaluate import Evaluation, right_answer
from paligemma_jax.evaluation.benchmarks.example import Example
from paligemma_jax.evaluation.benchmarks.metrics_file import definition
from paligemma_jax.evaluation.benchmarks.predictions import write_whole
from paligemma_jax.evaluation.benchmarks.report_pictures import pictures_of
from paligemma_jax.evaluation.metrics.by_figure import ByFigure
from paligemma_jax.processing.mask_codec import MaskCodec

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
