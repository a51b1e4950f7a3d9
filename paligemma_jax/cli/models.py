"""info, models and download: what a model is, which are published, and their files."""

import argparse
import dataclasses
import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.output import data_size, progress_bar

if TYPE_CHECKING:
    from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig
    from paligemma_jax.hub.catalogue import ModelInfo
    from paligemma_jax.weights.checkpoint import CheckpointInfo

_INFO = """\
Examples:
  paligemma info paligemma2-3b-mix-448       from its name; nothing is downloaded
  paligemma info checkpoint/                 what a checkpoint on disk holds, from its headers
  paligemma info checkpoint/ --check         reads all of it and verifies the checksums

All published models: paligemma models
"""
_MODELS = """\
Examples:
  paligemma models                      all published models
  paligemma models mix                  those with "mix" in their name or task
  paligemma models docvqa --json        JSON Lines, one object per model, with all aliases
  paligemma models --cached             those that are downloaded

"Memory" is that of the weights in bfloat16; int8 halves it, float32 doubles it. "Score" is the
published one, of the task that the model was fine-tuned for.
"""
_DOWNLOAD = """\
Examples:
  paligemma download paligemma2-3b-mix-448
  paligemma download paligemma-3b-pt-224 --revision bfloat16     half as large as main
  paligemma download google/paligemma-3b-pt-224-jax              big_vision's npz
  paligemma download google/paligemma-2/jax/paligemma2-3b-pt-224     from Kaggle
  paligemma download gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz   no account
  paligemma download https://example.com/model/                  any URL

The files go into the cache of the hub, where its own programs find them too; an interrupted
download resumes. Commands with --model do the same when they need it; there a revision is named as
paligemma-3b-pt-224@bfloat16.
Published models are gated: accept the license on the model's page, then log in (hf auth login) or
set HF_TOKEN. HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and KAGGLEHUB_CACHE are respected.
"""
_KINDS = {
    "big_vision": "big_vision .npz",
    "huggingface": "Hugging Face directory",
    "orbax": "directory written by paligemma-jax",
}


def add_info(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands, "info", run_info, "show what a model or checkpoint is",
        "Shows architecture, parameters and memory of a published model, or of a checkpoint on "
        "disk.", _INFO, json="one JSON object",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="name or path; demo is one too")
    parser.add_argument(
        "--check", action="store_true", help="verify the checksums of a converted checkpoint"
    )


def add_models(commands: Any) -> None:
    """Adds the parsers of models and download."""
    parser = options.add_command(
        commands, "models", run_models, "list the published models",
        "Lists the published models: size, resolution, memory, whether they are downloaded, task, "
        "and score.", _MODELS, json="JSON Lines, one object per model",
    )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the name or the task")
    parser.add_argument("--cached", action="store_true", help="only those that are downloaded")
    parser = options.add_command(
        commands, "download", run_download, "download a model",
        "Downloads a model into the cache of its hub, and prints where it is. At Hugging Face and "
        "Kaggle it looks for a newer version of what is there already.", _DOWNLOAD,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="name, alias, handle or URL")
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit at Hugging Face (default: main)"
    )


def run_info(args: argparse.Namespace) -> int:
    """`paligemma info`; returns the exit code."""
    from paligemma_jax.config import VARIANTS
    from paligemma_jax.loading import find_checkpoint, published_name
    from paligemma_jax.weights.checkpoint import describe
    from paligemma_jax.weights.convert import check

    published, checkpoint = published_name(args.model), None
    if published is None or args.check or Path(args.model).expanduser().exists():
        path = find_checkpoint(args.model, local_only=True)
        if args.check:
            with progress_bar(args, "B", "checking") as progress:
                check(path, progress)
        checkpoint = describe(path)
        name, config = str(checkpoint.path), checkpoint.config
    else:
        name, config = published, VARIANTS[published]
    if args.json:
        print(json.dumps(info_dict(name, config, checkpoint)))
        return 0
    print(info_text(name, config, checkpoint))
    if args.check:
        print("  check           every file and array is as it was written")
    if checkpoint is None:
        print(f"\nTo download it: paligemma download {name}")
    return 0


def info_dict(
    name: str, config: "PaliGemmaConfig", checkpoint: "CheckpointInfo | None"
) -> dict[str, Any]:
    """What `paligemma info` tells, as plain values; sizes in bytes."""
    from paligemma_jax.weights.sidecar_files import parameter_counts, weight_bytes

    counts = parameter_counts(config)
    result: dict[str, Any] = {
        "model": name,
        "image_encoder": encoder_name(config.img),
        "decoder": decoder_name(config.llm),
        "resolution": config.img.image_size,
        "image_tokens": config.img.num_patches,
        "text_length": config.text_length,
        "parameters": {"total": sum(counts.values()), **counts},
        "weight_bytes": weight_bytes(config),
        "kv_cache_bytes_per_token": _cache_bytes(config),
        "config": config.to_dict(),
    }
    if checkpoint is not None:
        quantization = checkpoint.quantization
        result["checkpoint"] = {
            "path": str(checkpoint.path),
            "kind": checkpoint.kind,
            "stored_bytes": checkpoint.nbytes,
            "parameters_by_dtype": checkpoint.dtypes,
            "quantization": quantization.to_dict() if quantization else None,
            "scale_bytes": checkpoint.scale_nbytes,
            "tokenizer": checkpoint.has_tokenizer,
            "mask_codec": checkpoint.has_mask_codec,
            "processor": checkpoint.processor,
        }
    return result


def info_text(name: str, config: "PaliGemmaConfig", checkpoint: "CheckpointInfo | None") -> str:
    """The same for people."""
    from paligemma_jax.weights.sidecar_files import parameter_counts, weight_bytes

    blocks = [[name], _rows(_architecture(config))]
    if checkpoint is not None:
        blocks.append(_rows(_checkpoint(checkpoint)))
    counts = parameter_counts(config)
    counts |= {"total": sum(counts.values())}
    blocks.append(["parameters", *[f"  {part:<16}{n:>16,}" for part, n in counts.items()]])
    cache = _cache_bytes(config)
    memory = [
        f"  {dtype:<16}{data_size(size):>16}   {data_size(1000 * cache[dtype])}"
        for dtype, size in weight_bytes(config).items()
    ]
    note = "  int8 and int4 are weights without their scales, and a bfloat16 cache: --quantize int8"
    blocks.append(["memory                     weights   KV cache of 1,000 tokens", *memory, note])
    return "\n\n".join("\n".join(block) for block in blocks)


def encoder_name(config: "SigLIPConfig") -> str:
    """ "SigLIP So400m/14", or the patch size alone for another size."""
    from paligemma_jax.config import SigLIPConfig

    sizes = ("patch_size", "width", "depth", "mlp_dim", "num_heads")
    if _same(config, SigLIPConfig(), sizes):
        return "SigLIP So400m/14"
    return f"SigLIP, patch {config.patch_size}"


def decoder_name(config: "GemmaConfig") -> str:
    """The published decoder of these sizes, or the family for another size."""
    from paligemma_jax.config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B, GEMMA_2B

    decoders = {"Gemma 2B": GEMMA_2B, "Gemma 2 2B": GEMMA2_2B, "Gemma 2 9B": GEMMA2_9B,
                "Gemma 2 27B": GEMMA2_27B}  # fmt: skip
    sizes = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "post_norms")
    other = "Gemma 2, other size" if config.post_norms else "Gemma, other size"
    return next((name for name, one in decoders.items() if _same(config, one, sizes)), other)


def _same(a: Any, b: Any, names: Sequence[str]) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in names)


Row = tuple[str, str]  # label, text


def _rows(rows: list[Row]) -> list[str]:
    return [f"  {label:<16}{text}" for label, text in rows]


def _architecture(config: "PaliGemmaConfig") -> list[Row]:
    img, llm = config.img, config.llm
    rows = [
        ("image encoder", encoder_name(img)),
        ("", f"{img.depth} layers, width {img.width}, MLP {img.mlp_dim}, {img.num_heads} heads"),
        ("image", f"{img.image_size} x {img.image_size} pixels, {img.num_patches:,} image tokens"),
        ("decoder", decoder_name(llm)),
        ("", f"{llm.depth} layers, width {llm.width}, MLP {llm.mlp_dim}, {llm.num_heads} heads and "
         f"{llm.num_kv_heads} key-value of {llm.head_dim}"),
        ("vocabulary", f"{llm.vocab_size:,} pieces"),
        ("text length", f"{config.text_length} tokens of prompt and answer, as trained"),
    ]  # fmt: skip
    softcaps = {"attention": llm.attn_logit_softcap, "output": llm.final_logit_softcap}
    caps = [f"{place} logits capped at {cap:g}" for place, cap in softcaps.items() if cap]
    if caps:
        rows.append(("soft-caps", ", ".join(caps)))
    if llm.sliding_window:
        rows.append(("sliding window", f"{llm.sliding_window:,} tokens on even layers"))
    return rows


def _checkpoint(info: "CheckpointInfo") -> list[Row]:
    image, encoding = info.processor["image"], info.processor["encoding"]
    codec = "present" if info.has_mask_codec else "missing; segment takes it as --mask-codec"
    return [
        ("checkpoint", f"{_KINDS[info.kind]}, {data_size(info.nbytes)} of weights"),
        ("stored", ", ".join(f"{count:,} in {dtype}" for dtype, count in info.dtypes.items())),
        *_quantization(info),
        ("tokenizer", "present" if info.has_tokenizer else "missing; pass it as --tokenizer"),
        ("mask codec", codec),
        ("preprocessing", f"images {image['method']} to {image['size']} pixels a side,"),
        ("", f"prompts encoded by the rule of {encoding}"),
    ]


def _quantization(info: "CheckpointInfo") -> list[Row]:
    if info.quantization is None:
        return []
    parts = []
    for part, name in info.quantization.to_dict().items():
        format, _, group = (name or "as trained").partition(":")
        groups = {"": "", "row": ", a scale a channel"}.get(group, f" in groups of {group}")
        parts.append(f"{part} {format}{groups}")
    scales, calibrated = f"{data_size(info.scale_nbytes)} of scales", info.origin.get("calibrated")
    if calibrated is not None:
        scales += f"; calibrated on {calibrated}"
    return [("quantized", "; ".join(parts)), ("", scales)]


def _cache_bytes(config: "PaliGemmaConfig") -> dict[str, int]:
    """Bytes per token; keys and values are kept in the activations' dtype, never an integer."""
    from paligemma_jax.weights.sidecar_files import PRECISIONS, cache_bytes_per_token

    return {
        name: cache_bytes_per_token(config.llm, max(16, bits)) for name, bits in PRECISIONS.items()
    }


def run_models(args: argparse.Namespace) -> int:
    """`paligemma models`; returns the exit code."""
    from paligemma_jax.hub.catalogue import MODELS

    rows = [_model(one) for one in MODELS.values() if _matches(one, args.words)]
    if args.cached:
        rows = [row for row in rows if row["cached"]]
    if args.json:
        for row in rows:
            print(json.dumps(row))
    elif rows:
        _print_table(rows)
    else:
        print("none")
    return 0


def run_download(args: argparse.Namespace) -> int:
    """`paligemma download`; returns the exit code."""
    from paligemma_jax.hub.catalogue import find_location
    from paligemma_jax.hub.download import download
    from paligemma_jax.loading import find_checkpoint

    location = find_location(args.model, args.revision)
    if location is None:
        path = find_checkpoint(args.model)  # demo, a path, or an error
    else:
        with progress_bar(args, "B", f"downloading {location}") as progress:
            path = download(location, progress, refresh=True)
    print(path)
    return 0


def _matches(model: "ModelInfo", words: list[str]) -> bool:
    text = f"{model.name} {model.use} {' '.join(model.aliases)}".lower()
    return all(word.lower().removeprefix("google/") in text for word in words)


def _model(model: "ModelInfo") -> dict[str, Any]:
    from paligemma_jax.hub.catalogue import OPEN_COPIES
    from paligemma_jax.hub.download import cached, cached_locations
    from paligemma_jax.weights.sidecar_files import parameter_counts, weight_bytes

    return dataclasses.asdict(model) | {
        "size": model.size.upper(),
        "task": model.task or None,
        "image_tokens": model.config.img.num_patches,
        "text_length": model.config.text_length,
        "parameters": sum(parameter_counts(model.config).values()),
        "memory_bytes": weight_bytes(model.config),
        "cached": [{"source": str(s), "path": str(cached(s))} for s in cached_locations(model)],
        "hugging_face": model.repository,
        "hugging_face_jax": model.jax_repository,
        "revisions": model.revisions,
        "kaggle": model.kaggle,
        "open_copy": OPEN_COPIES.get(model.name),
        "keras_preset": model.keras_preset,
        "aliases": model.aliases,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from paligemma_jax.hub.catalogue import MODELS

    table = [("name", "size", "pixels", "memory", "cached")]
    tasks = ["task; published score"]
    for row in rows:
        memory, cached = data_size(row["memory_bytes"]["bfloat16"]), "yes" if row["cached"] else ""
        table.append((row["name"], row["size"], str(row["resolution"]), memory, cached))
        score = MODELS[row["name"]].score
        tasks.append(row["use"] + ("" if score is None else f"; {score}"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    indent = sum(widths) + 2 * len(widths)
    # Where there is no terminal, a line a model: that can be searched.
    width = max(shutil.get_terminal_size((10_000, 24)).columns, indent + 32)
    for cells, task in zip(table, tasks, strict=True):
        padded = "".join(f"{cell:{size}}  " for cell, size in zip(cells, widths, strict=True))
        first, *rest = textwrap.wrap(task, width - indent, break_on_hyphens=False)
        print(padded + first)
        for line in rest:
            print(" " * indent + line)
