"""`paligemma models` and `paligemma download`: what is published, and its files."""

import argparse
import dataclasses
import json
import shutil
import textwrap
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.progress import byte_bar
from paligemma_jax.cli.sizes import data_size

if TYPE_CHECKING:
    from paligemma_jax.hub.catalogue import Published

_EPILOG = """\
Examples:
  paligemma models                      all published models
  paligemma models mix                  those with "mix" in their name or use
  paligemma models docvqa --json        one JSON document a line and model, with all aliases
  paligemma models --cached             those that are downloaded

"Memory" is that of the weights in bfloat16; int8 halves it, float32 doubles it. "Score" is the
published one, of the task that the model was fine-tuned for.
"""
_DOWNLOAD_EPILOG = """\
Examples:
  paligemma download paligemma2-3b-mix-448
  paligemma download paligemma-3b-pt-224 --revision bfloat16     half as large as main
  paligemma download google/paligemma-3b-pt-224-jax              big_vision's npz
  paligemma download google/paligemma-2/jax/paligemma2-3b-pt-224     from Kaggle
  paligemma download gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz   no account
  paligemma download https://example.com/model/                  any address

The files go into the cache of the hub, where its own programs find them too; a download that was
interrupted goes on where it stopped. Commands with --model do the same when they need it; there
a revision is named as paligemma-3b-pt-224@bfloat16.
Published models are gated: accept the licence on the model's page, then log in (hf auth login) or
set HF_TOKEN. HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and KAGGLEHUB_CACHE are respected.
"""


def add(commands: Any) -> None:
    """Adds the parsers of both commands."""
    parser = options.add_command(
        commands,
        "models",
        run,
        "list the published models",
        "Lists the published models: size, resolution, memory, whether they are downloaded, "
        "score, and what each is for.",
        _EPILOG,
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the name or the use")
    parser.add_argument("--cached", action="store_true", help="only those that are downloaded")
    options.add_json(parser, "one JSON document a line and model")
    parser = options.add_command(
        commands,
        "download",
        download,
        "download a model",
        "Downloads a model into the cache of its hub, and prints where it is. At Hugging Face "
        "and Kaggle it looks for a newer version of what is there already.",
        _DOWNLOAD_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="name, alias, handle or address")
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit at Hugging Face (default: main)"
    )


def run(args: argparse.Namespace) -> int:
    """`paligemma models`; returns the exit code."""
    from paligemma_jax.hub.catalogue import CATALOGUE

    entries = [entry for entry in CATALOGUE.values() if _is_meant(entry, args.words)]
    rows = [_row(entry) for entry in entries]
    if args.cached:
        rows = [row for row in rows if row["cached"]]
    if args.json:
        for row in rows:
            print(json.dumps(row))
        return 0
    if not rows:
        print("none")
        return 0
    _print_table(rows)
    return 0


def download(args: argparse.Namespace) -> int:
    """`paligemma download`; returns the exit code."""
    from paligemma_jax.hub.fetch import fetch
    from paligemma_jax.hub.sources import find_source
    from paligemma_jax.resolve import find_checkpoint

    source = find_source(args.model, args.revision)
    if source is None:
        path = find_checkpoint(args.model)  # demo, a path, or an error
    else:
        with byte_bar(args, f"downloading {source}") as progress:
            path = fetch(source, progress, refresh=True)
    print(path)
    return 0


def _is_meant(entry: "Published", words: list[str]) -> bool:
    text = f"{entry.name} {entry.use} {' '.join(entry.aliases)}".lower()
    return all(word.lower().removeprefix("google/") in text for word in words)


def _row(entry: "Published") -> dict[str, Any]:
    from paligemma_jax.hub.fetch import cached, cached_sources
    from paligemma_jax.hub.sources import OPEN_COPIES
    from paligemma_jax.weights.footprint import parameter_counts, weight_bytes

    sources = cached_sources(entry)
    return {
        "name": entry.name,
        "generation": entry.generation,
        "size": entry.size.upper(),
        "kind": entry.kind,
        "task": entry.task or None,
        "resolution": entry.resolution,
        "use": entry.use,
        "parameters": sum(parameter_counts(entry.config).values()),
        "memory_bytes": weight_bytes(entry.config),
        "score": None if entry.score is None else dataclasses.asdict(entry.score),
        "cached": [{"source": str(s), "path": str(cached(s))} for s in sources],
        "hugging_face": entry.repository,
        "hugging_face_jax": entry.jax_repository,
        "revisions": list(entry.revisions),
        "kaggle": entry.kaggle,
        "open_copy": OPEN_COPIES.get(entry.name),
        "keras_preset": entry.keras_preset,
        "aliases": list(entry.aliases),
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from paligemma_jax.hub.catalogue import CATALOGUE

    columns = [
        ("name", [row["name"] for row in rows]),
        ("size", [row["size"] for row in rows]),
        ("pixels", [str(row["resolution"]) for row in rows]),
        ("memory", [data_size(row["memory_bytes"]["bfloat16"]) for row in rows]),
        ("cached", ["yes" if row["cached"] else "" for row in rows]),
    ]
    widths = [max(len(title), *map(len, cells)) for title, cells in columns]
    scores = (CATALOGUE[row["name"]].score for row in rows)
    last = [
        row["use"] + ("" if score is None else f"; {score}")
        for row, score in zip(rows, scores, strict=True)
    ]
    indent = sum(widths) + 2 * len(widths)
    # Where there is no terminal, a line a model: that can be searched.
    width = max(shutil.get_terminal_size((10_000, 24)).columns, indent + 32)
    titles = [f"{title:{size}}" for (title, _), size in zip(columns, widths, strict=True)]
    print("  ".join([*titles, "what it is for; published score"]))
    for number, text in enumerate(last):
        cells = [
            f"{cells[number]:>{size}}" if title == "memory" else f"{cells[number]:{size}}"
            for (title, cells), size in zip(columns, widths, strict=True)
        ]
        first, *rest = textwrap.wrap(text, width - indent, break_on_hyphens=False)
        print("  ".join([*cells, first]))
        for line in rest:
            print(" " * indent + line)
