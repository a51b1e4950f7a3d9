"""`paligemma eval`: a model's scores on a published task, and the examples behind them."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.output import load_pipeline, progress_bar
from paligemma_jax.errors import ConfigError

if TYPE_CHECKING:
    from paligemma_jax.evaluation.evaluate import EvaluationResult
    from paligemma_jax.evaluation.examples import Example
    from paligemma_jax.evaluation.tasks import EvaluationTask
    from paligemma_jax.processing.masks import MaskCodec


DEMO = "demo"
_BATCH_SIZE = 8
_SETTINGS = ("dtype", "quantize", "adapter", "resolution")  # that change answers

_EPILOG = """\
Examples:
  paligemma eval --list                                 every task
  paligemma eval --list --task docvqa                   what data it expects
  paligemma eval --task demo                            the table of the demo model's card
  paligemma eval --model paligemma2-3b-mix-448 --task docvqa --data docvqa/ --out docvqa-mix
  paligemma eval --model my-model --task detection --data valid.jsonl --limit 200

The folder of --out gets predictions.jsonl, metrics.json, report.html, and submission.json where the
task has a test server. Run again with the same settings, it goes on where it stopped. Examples
whose images cannot be read are skipped, counted and named.

All accelerators of the machine answer together. On several machines with one folder for --out:
  paligemma eval --task docvqa --data docvqa/ --out shared/run --shard 0/2
  paligemma eval --task docvqa --data docvqa/ --out shared/run --shard 1/2
The last one to finish writes the scores of all examples.
"""


def add_evaluate(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands, "eval", run_evaluate, "measure a model on a published task",
        "Asks a model all questions of a task, and prints its scores with 95 % confidence "
        "intervals beside the published ones.", _EPILOG,
        json="print metrics.json instead of a table",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="show all tasks, or one task's data")
    parser.add_argument("--task", metavar="NAME", help="of --list")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="folder with NAME.jsonl, a .jsonl file, or a data set of COCO, Roboflow or tfds",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="of a data set (default: test, else validation)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="keep predictions and report here")
    parser.add_argument(
        "--limit", type=options.at_least(1), metavar="N",
        help="only the first N examples (scenes of the demo)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", metavar="TEXT", help="instead of the task's, such as 'answer en {question}'"
    )
    parser.add_argument(
        "--max-new-tokens", type=options.at_least(1), metavar="N",
        help="maximum number of new tokens (default: the task's)",
    )  # fmt: skip
    parser.add_argument(
        "--num-beams", type=options.at_least(1), metavar="N",
        help="of beam search; 1 is greedy (default: the task's)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=options.at_least(1), metavar="N",
        help="examples that each accelerator, or group of them that shares a model, answers "
        "together (default: 8; demo: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="answer shard I (from 0) of N; needs --out"
    )
    options.add_model(parser, mask_codec=True)


def run_evaluate(args: argparse.Namespace) -> int:
    """`paligemma eval`; returns the exit code."""
    from paligemma_jax.evaluation.tasks import find_task

    if args.list:
        print(_data_of(args.task) if args.task else _all())
        return 0
    if not args.task:
        args.usage_error("which task? --task NAME; all of them: paligemma eval --list")
    if args.shard is not None and args.out is None:
        args.usage_error("--shard needs --out FOLDER, where all processes keep their answers")
    if args.task == DEMO:
        from paligemma_jax.evaluation import demo

        for name in ("data", "split", "prompt", "max_new_tokens", "num_beams"):
            if getattr(args, name) is not None:
                option = "--" + name.replace("_", "-")
                args.usage_error(f"the demo world has its own questions; leave {option} out")
        args.batch_size = args.batch_size or demo.BATCH_SIZE
        return _run(args, demo.DEMO, demo.demo_examples(args.limit or demo.SCENES))
    from paligemma_jax.evaluation.examples import expected_files, read_examples

    task = find_task(args.task)
    if args.prompt is not None and "labels" in task.example:
        args.usage_error(f"the prompt of {args.task} is made of its labels; leave --prompt out")
    if args.data is None:
        raise ConfigError(
            f"{args.task} needs --data. Expected: {expected_files(task)}\nWrite: paligemma eval "
            f"--task {args.task} --data FOLDER"
        )
    examples = read_examples(
        task, args.data, limit=args.limit, prompt=args.prompt, split=args.split
    )
    return _run(args, task, examples)


def _run(args: argparse.Namespace, task: "EvaluationTask", examples: "Sequence[Example]") -> int:
    from paligemma_jax.evaluation.evaluate import evaluate
    from paligemma_jax.generation.devices import batch_shards, on_devices

    pipeline = load_pipeline(args)
    if args.mesh is None:
        pipeline = dataclasses.replace(pipeline, model=on_devices(pipeline.model))
    batch_size = (args.batch_size or _BATCH_SIZE) * batch_shards(pipeline.model)
    out = None if args.out is None else Path(args.out).expanduser()
    number, count = args.shard or (0, 1)
    total = len(examples[number::count])
    with progress_bar(args, "example", total=total) as progress:
        done = evaluate(
            pipeline,
            task,
            examples,
            out=out,
            model=args.model,
            settings={name: getattr(args, name) for name in _SETTINGS},
            batch_size=batch_size,
            max_new_tokens=args.max_new_tokens,
            num_beams=args.num_beams,
            shard=args.shard,
            progress=progress,
        )
    if done.missing:
        print(
            f"shard {number} of {count} is done: {len(done.examples):,} examples. Other processes "
            f"have {done.missing:,} still to answer; the last one writes the scores."
        )
        return 0
    written = [] if out is None else _write(args, done, out, pipeline.mask_codec)
    if args.json:
        print(json.dumps(done.to_dict(args.model), ensure_ascii=False))
        return 0
    _show(done)
    for path in written:
        print(path)
    return 0


def _write(
    args: argparse.Namespace, done: "EvaluationResult", out: Path, codec: "MaskCodec | None"
) -> list[Path]:
    from paligemma_jax.evaluation.evaluate import write_metrics, write_submission
    from paligemma_jax.evaluation.report import write_report

    written = [write_metrics(done, out, args.model)]
    written.append(write_report(done, out, model=args.model, codec=codec))
    submission = write_submission(done, out)
    return written + ([submission] if submission else [])


def _show(done: "EvaluationResult") -> None:
    task, main = done.task, done.main
    if task.name == DEMO:
        from paligemma_jax.evaluation.demo import demo_table

        print(demo_table(done), end="\n\n")
    interval = f"{main.low:.2f} to {main.high:.2f}"
    print(f"{task.task.title}: {task.main} {main.value:.2f} ({interval})")
    for name, score in done.scores.items():
        print(f"  {name:24} {score.value:8.4f}  {score.low:.4f} to {score.high:.4f}")
    print(f"  examples {done.counts['num']:,.0f}, skipped {done.counts['skipped']:,.0f}")
    for id, reason in done.metric.skipped.items():
        print(f"    {id}: {reason}")
    if task.published:
        print(f"  published (times {task.scale:g}):")
        for name, value in task.published.items():
            print(f"    {name:20} {value:g}")
    if task.notes:
        print(f"  {task.notes}")


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N such as 0/2 or 1/2, got {text!r}")
    return int(number), int(count)


def _all() -> str:
    from paligemma_jax.evaluation.tasks import TASKS

    lines = [f"{DEMO:16} the table of the demo model's card; needs no data"]
    lines += [f"{t.name:16} {t.task.title} ({t.task.source}): {t.main}" for t in TASKS.values()]
    return "\n".join([*lines, "", "The data of one: paligemma eval --list --task docvqa"])


def _data_of(name: str) -> str:
    from paligemma_jax.evaluation.examples import expected_files
    from paligemma_jax.evaluation.tasks import find_task

    if name == DEMO:
        return "The demo world is drawn as it is asked about; it needs no data."
    task = find_task(name)
    decoding = f"{task.num_beams} beams" if task.num_beams > 1 else "greedy"
    lines = [
        f"{task.task.title} ({task.task.source})",
        f"data: {expected_files(task)}",
        f"prompt: {task.task.prompt_of(task.example)!r}",
        f"answers: at most {task.max_new_tokens} new tokens, {decoding}",
        f"metric: {task.main}, times {task.scale:g}",
        *[f"published: {name} {value:g}" for name, value in task.published.items()],
    ]
    return "\n".join([*lines, *([task.notes] if task.notes else [])])
