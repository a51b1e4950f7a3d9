"""`paligemma convert`: a checkpoint of any format into any other.

`paligemma quantize`: rounds a model's weights, and tells what that saves and costs.

`paligemma info`: what a model is, before or after it is downloaded.

The text and the JSON document of `paligemma info`.

`paligemma models` and `paligemma download`: what is published, and its files.
"""

import argparse
import dataclasses
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.output import byte_bar, count_bar, data_size, status
from paligemma_jax.config import (
    GEMMA2_2B,
    GEMMA2_9B,
    GEMMA2_27B,
    GEMMA_2B,
    VARIANTS,
    GemmaConfig,
    PaliGemmaConfig,
    SigLIPConfig,
)
from paligemma_jax.weights.sidecar_files import (
    PRECISIONS,
    cache_bytes_per_token,
    parameter_counts,
    weight_bytes,
)

if TYPE_CHECKING:
    from paligemma_jax.evaluation.quantization_report import QuantizationReport
    from paligemma_jax.hub.catalogue import ModelInfo
    from paligemma_jax.pipeline import Pipeline
    from paligemma_jax.weights.checkpoint import CheckpointInfo


FORMATS = ("orbax", "huggingface", "big_vision")  # as `weights.formats` has them
_convert_EPILOG = """\
Examples:
  paligemma convert paligemma2-3b-mix-448 store/
  paligemma convert paligemma-3b-pt-224.npz store/ --tokenizer paligemma_tokenizer.model
  paligemma convert store/ for_transformers/ --to huggingface --verify
  paligemma convert store/ model.npz --to big_vision --dtype bfloat16
  paligemma convert paligemma2-3b-pt-224 pt-448/ --resolution 448
  paligemma convert paligemma2-3b-mix-448 small/ --quantize int4
  paligemma convert small/ for_transformers/ --to huggingface --dequantize

  orbax        one directory with everything in it, digests of all arrays included; loads fastest
  huggingface  sharded safetensors with tokenizer and settings: for transformers, and Roboflow's
               deploy
  big_vision   an npz; a directory of it and the tokenizer where TARGET does not end in .npz

Layers pass one by one, so that memory does not depend on the size of the model. TARGET appears when
all of it is written, and nothing that exists is overwritten. Dtypes stay as they are without
--dtype. With --quantize they are rounded as `--model SOURCE --quantize` would, once for all: only
orbax has room for that. `paligemma info TARGET --check` finds a changed byte later.
"""


def add_convert(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "convert",
        run_convert,
        "write a checkpoint in another format",
        "Writes a checkpoint of any format as our own store, for transformers, or as big_vision's "
        "npz.",
        _convert_EPILOG,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="Hugging Face directory, big_vision .npz, converted directory, or demo",
    )
    parser.add_argument("target", metavar="TARGET", help="what to write; must not exist")
    parser.add_argument("--to", choices=FORMATS, default="orbax", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=options.DTYPES, help="cast all floats")
    bits = parser.add_mutually_exclusive_group()
    options.add_quantize(bits, "round weights to so many bits, and store them so")
    bits.add_argument(
        "--dequantize", action="store_true",
        help="make floats again of what is stored in few bits (default dtype: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="resample the position embeddings to pictures of so many pixels a side",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.model or tokenizer.json, where none lies beside the weights",
    )
    options.add_mask_codec(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read TARGET again, and compare it with SOURCE tensor by tensor",
    )


def run_convert(args: argparse.Namespace) -> int:
    """`paligemma convert`; returns the exit code."""
    from paligemma_jax.loading import find_checkpoint
    from paligemma_jax.weights.convert import convert

    source = find_checkpoint(args.source)
    with byte_bar(args, "converting") as progress:
        convert(
            source,
            args.target,
            format=args.to,
            dtype=args.dtype,
            resolution=args.resolution,
            tokenizer=args.tokenizer,
            mask_codec=args.mask_codec,
            quantize=args.quantize,
            dequantize=args.dequantize,
            verify=args.verify,
            progress=progress,
        )
    print(f"{args.target}: {describe_target(args.target)}")
    if args.verify:
        print(f"{args.target}: every tensor is as in {args.source}")
    return 0


def describe_target(path: str) -> str:
    """What was written there, in a line."""
    from paligemma_jax.weights.checkpoint import describe

    target = Path(path).expanduser()
    written = describe(target)
    size = f"{written.parameters:,} parameters in {' and '.join(written.dtypes)}"
    rest = ""
    if target.is_dir():
        rest = ", tokenizer and mask codec" if written.has_mask_codec else " and tokenizer"
        rest = f", with configuration, preprocessing{rest}"
    return f"{size}, {data_size(written.nbytes)}{rest}"


SCENES, PROMPTS, CALIBRATION = 500, 200, 400
RECORDS = 256  # as `paligemma_jax.training.calibrate`

_quantize_EPILOG = """\
Examples:
  paligemma quantize paligemma2-3b-mix-448 small --quantization int8      store it in 8 bits
  paligemma quantize paligemma2-3b-mix-448 small --calibrate train.jsonl
  paligemma quantize demo --report                    the demo model in 8 and in 4 bits
  paligemma quantize demo --report --quantization int4 --scenes 100
  paligemma quantize paligemma2-3b-mix-448 --report   without scores, which are the demo's

TARGET is a store that every command opens as --model TARGET. Without --calibrate it is what convert
--quantize writes: layers pass one by one. With it, weights of 4 bits are rounded by what the model
multiplies them with when it reads some prompts and answers (GPTQ), and lose about half as much: the
model is in memory for that, and up to 4 GB beside it.

For --report the model answers prompts about drawn scenes; then it and the rounded model read those
answers. "KL" is how far the distribution of the next token moves (Kullback-Leibler divergence, nats
a token), "top-1 agreement" how often the most likely token stays. "calibr." is calibrated on other scenes.
Scores are those of the demo benchmark: python -m paligemma_jax.evaluation.demo. Tokens a second are
those of one answer, while this ran.
"""


def add_quantize(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "quantize",
        run_quantize,
        "store weights of 8 or 4 bits, measure what they change",
        "Writes a model with its weights rounded, or compares it with itself after that: memory, "
        "speed, what it would say next, and how well it does.",
        _quantize_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="demo, or a checkpoint of any format")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="what to write; must not exist")
    parser.add_argument(
        "--report", action="store_true", help="measure and print; nothing is written"
    )
    parser.add_argument(
        "--quantization", action="append", type=options.quantization, metavar="FORMAT",
        help=f"{options.QUANTIZATION_FORMATS}; of --report there may be several "
        "(default: int4; --report: int8 and int4)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=options.DTYPES,
        help="of the weights before, and of what stays floats (default: bfloat16; without "
        "--calibrate and --report as they are stored)",
    )  # fmt: skip
    parser.add_argument(
        "--scenes", type=options.count(100_000), metavar="N",
        help=f"of the demo benchmark (default: {SCENES} for demo, else 0: no scores)",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=options.positive(100_000), default=PROMPTS, metavar="N",
        help="whose answers are compared token by token (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-prompts", type=options.count(100_000), metavar="N",
        help="of the report, about other scenes; 4 bits are measured calibrated on them, too "
        f"(default: {CALIBRATION} for demo, else 0: not)",
    )  # fmt: skip
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibrate", metavar="DATA",
        help="a .jsonl file or a folder as train takes it: prompts with answers about pictures, of "
        "the kind that will be asked",
    )  # fmt: skip
    calibration.add_argument(
        "--records", type=options.positive(1_000_000), default=RECORDS, metavar="N",
        help="of DATA to read (default: %(default)s)",
    )  # fmt: skip
    options.add_batch_size(parser, "records of --calibrate")
    parser.add_argument("--verify", action="store_true", help="read TARGET again, and compare it")
    options.add_json(parser, "one JSON document")


def run_quantize(args: argparse.Namespace) -> int:
    """`paligemma quantize`; returns the exit code."""
    if args.report == (args.target is not None):
        args.usage_error("Give either TARGET, to write a model of few bits, or --report.")
    if args.report:
        if args.calibrate is not None:
            args.usage_error("--calibrate is for TARGET; --report has --calibration-prompts.")
        return _report(args)
    if len(args.quantization or ()) > 1:
        args.usage_error("--quantization comes once with TARGET.")
    quantization = (args.quantization or ["int4"])[0]
    if args.calibrate is None:
        _write(args, quantization)
    else:
        _write_calibrated(args, quantization)
    print(f"{args.target}: {describe_target(args.target)}")
    return 0


def _write(args: argparse.Namespace, quantization: str) -> None:
    from paligemma_jax.loading import find_checkpoint
    from paligemma_jax.weights.convert import convert

    source = find_checkpoint(args.model)
    with byte_bar(args, "rounding") as progress:
        convert(
            source,
            args.target,
            dtype=args.dtype,
            quantize=quantization,
            verify=args.verify,
            progress=progress,
        )


def _write_calibrated(args: argparse.Namespace, quantization: str) -> None:
    from paligemma_jax.filesystem import refuse_existing
    from paligemma_jax.training.calibrate import calibrate

    refuse_existing(Path(args.target).expanduser())  # before all the work
    pipeline = _load(args)
    with count_bar(args, "record") as records:
        pipeline = calibrate(
            pipeline,
            args.calibrate,
            quantization,
            records=args.records,
            batch_size=args.batch_size,
            progress=records,
        )
    with byte_bar(args, "writing") as progress:
        origin = {"kind": "quantized", "base": args.model, "calibrated": Path(args.calibrate).name}
        pipeline.save(args.target, verify=args.verify, origin=origin, progress=progress)


def _load(args: argparse.Namespace) -> "Pipeline":
    from paligemma_jax.loading import from_pretrained

    with byte_bar(args, f"loading {args.model}") as progress:
        return from_pretrained(args.model, dtype=args.dtype or "bfloat16", progress=progress)


def _report(args: argparse.Namespace) -> int:
    from paligemma_jax.evaluation.quantization_report import report
    from paligemma_jax.loading import DEMO

    scenes, calibrate = (
        given if given is not None else number if args.model == DEMO else 0
        for given, number in ((args.scenes, SCENES), (args.calibration_prompts, CALIBRATION))
    )
    pipeline = _load(args)
    formats = tuple(dict.fromkeys(args.quantization or ("int8", "int4")))
    with status(args, "measuring"):
        found = report(pipeline, formats, scenes=scenes, prompts=args.prompts, calibrate=calibrate)
    print(json.dumps(found.to_dict()) if args.json else "\n".join(_lines(args.model, found)))
    return 0


def _lines(model: str, found: "QuantizationReport") -> Iterator[str]:
    from paligemma_jax.evaluation.quantization_report import BEFORE, max_loss

    forms = found.variants
    formats = [name for name in forms if name != BEFORE]
    yield f"{model}: weights of {found.dtype} before, activations of {found.dtype}"
    yield ""
    yield _quantize_line("", [found.dtype if name == BEFORE else name for name in forms])
    yield _quantize_line("weights", [data_size(form.nbytes) for form in forms.values()])
    yield _quantize_line(
        "  language model", [data_size(form.text_nbytes) for form in forms.values()]
    )
    yield _quantize_line("tokens/s", [f"{form.tokens_per_second:.1f}" for form in forms.values()])
    close = [forms[name].agreement for name in formats]
    yield _quantize_line("KL", ["", *[f"{a.divergence:.5f}" for a in close if a]])
    same = [f"{100 * a.top1_agreement:.2f} %" for a in close if a]
    yield _quantize_line("top-1 agreement", ["", *same])
    if not found.scenes:
        return
    yield ""
    for score in forms[BEFORE].scores:
        yield _quantize_line(
            score, [f"{100 * form.scores[score]:.1f} %" for form in forms.values()]
        )
    worst = [max(found.losses(name).values()) for name in formats]
    yield _quantize_line("largest loss, points", ["", *[f"{loss:.1f}" for loss in worst]])
    yield _quantize_line("  may be", ["", *[f"{max_loss(name):.1f}" for name in formats]])
    yield _quantize_line(
        "  reached",
        ["", *["yes" if x <= max_loss(n) else "no" for n, x in zip(formats, worst, strict=True)]],
    )


def _quantize_line(title: str, cells: Sequence[str]) -> str:
    return f"{title:26}" + "".join(f"{cell:>14}" for cell in cells)


_info_EPILOG = """\
Examples:
  paligemma info --list                      every published model
  paligemma info paligemma2-3b-mix-448       from its name; nothing is downloaded
  paligemma info store/                      what a checkpoint on disk holds, from its headers
  paligemma info store/ --check              reads all of it and compares the digests
"""


def add_info(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "info",
        run_info,
        "show what a model or checkpoint is",
        "Shows architecture, parameters and memory of a published model, or of a checkpoint on "
        "disk.",
        _info_EPILOG,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", metavar="MODEL", help="name or path; demo is one too")
    what.add_argument("--list", action="store_true", help="list the published models")
    parser.add_argument(
        "--check", action="store_true", help="verify the digests of a converted checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")


def run_info(args: argparse.Namespace) -> int:
    """`paligemma info`; returns the exit code."""
    if args.list:
        return _list(args)
    from paligemma_jax.loading import find_checkpoint, published_name

    published = published_name(args.model)
    if published is None or args.check or Path(args.model).expanduser().exists():
        checkpoint = _info_checkpoint(args, find_checkpoint(args.model, local_only=True))
        name, config = str(checkpoint.path), checkpoint.config
    else:
        checkpoint, name, config = None, published, VARIANTS[published]
    if args.json:
        print(json.dumps(as_dict(name, config, checkpoint)))
    else:
        print(as_text(name, config, checkpoint))
        if args.check:
            print("  check           every file and array is as it was written")
        if checkpoint is None:
            print(f"\nTo download it: paligemma download {name}")
    return 0


def _info_checkpoint(args: argparse.Namespace, path: Path) -> "CheckpointInfo":
    from paligemma_jax.weights.checkpoint import describe
    from paligemma_jax.weights.convert import check

    if args.check:
        with byte_bar(args, "checking") as progress:
            check(path, progress)
    return describe(path)


def _list(args: argparse.Namespace) -> int:
    from paligemma_jax.weights.sidecar_files import parameter_counts

    rows = [
        {
            "name": name,
            "parameters": sum(parameter_counts(config).values()),
            "resolution": config.img.image_size,
            "image_tokens": config.img.num_patches,
            "text_length": config.text_length,
        }
        for name, config in VARIANTS.items()
    ]
    if args.json:
        print(json.dumps(rows))
        return 0
    width = max(map(len, VARIANTS))
    print(f"{'name':{width}}  {'parameters':>14}  pixels  image tokens  text tokens")
    for row in rows:
        print(
            f"{row['name']:{width}}  {row['parameters']:14,}  {row['resolution']:6}  "
            f"{row['image_tokens']:12,}  {row['text_length']:11}"
        )
    return 0


_KINDS = {
    "big_vision": "big_vision .npz",
    "huggingface": "Hugging Face directory",
    "orbax": "directory written by paligemma-jax",
}
_DECODERS = {
    "Gemma 2B": GEMMA_2B,
    "Gemma 2 2B": GEMMA2_2B,
    "Gemma 2 9B": GEMMA2_9B,
    "Gemma 2 27B": GEMMA2_27B,
}


def as_dict(
    name: str, config: PaliGemmaConfig, checkpoint: "CheckpointInfo | None"
) -> dict[str, Any]:
    """Plain values, ready for JSON; sizes in bytes."""
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
        "kv_cache_bytes_per_token": {
            name: cache_bytes_per_token(config.llm, _cache_bits(bits))
            for name, bits in PRECISIONS.items()
        },
        "config": config.to_dict(),
    }
    if checkpoint is not None:
        result["checkpoint"] = {
            "path": str(checkpoint.path),
            "kind": checkpoint.kind,
            "stored_bytes": checkpoint.nbytes,
            "parameters_by_dtype": checkpoint.dtypes,
            "quantization": None
            if checkpoint.quantization is None
            else checkpoint.quantization.to_dict(),
            "scale_bytes": checkpoint.scale_nbytes,
            "tokenizer": checkpoint.has_tokenizer,
            "mask_codec": checkpoint.has_mask_codec,
            "processor": checkpoint.processor,
        }
    return result


def as_text(name: str, config: PaliGemmaConfig, checkpoint: "CheckpointInfo | None") -> str:
    """The same for people."""
    blocks = [[name], _architecture(config)]
    if checkpoint is not None:
        blocks.append(_describe_checkpoint(checkpoint))
    return "\n\n".join(
        "\n".join(block) for block in [*blocks, _parameters(config), _memory(config)]
    )


def encoder_name(config: SigLIPConfig) -> str:
    """ "SigLIP So400m/14", or the patch size alone for another size."""
    if _encoder_sizes(config) == _encoder_sizes(SigLIPConfig()):
        return "SigLIP So400m/14"
    return f"SigLIP, patch {config.patch_size}"


def decoder_name(config: GemmaConfig) -> str:
    """The published decoder of these sizes, or the family for another size."""
    for name, published in _DECODERS.items():
        if _decoder_sizes(config) == _decoder_sizes(published):
            return name
    return "Gemma 2, own size" if config.post_norms else "Gemma, own size"


def _encoder_sizes(c: SigLIPConfig) -> tuple[int, ...]:
    return c.patch_size, c.width, c.depth, c.mlp_dim, c.num_heads


def _decoder_sizes(c: GemmaConfig) -> tuple[int, ...]:
    return c.width, c.depth, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.post_norms


def _describe_line(label: str, text: str) -> str:
    return f"  {label:<16}{text}"


def _architecture(config: PaliGemmaConfig) -> list[str]:
    img, llm = config.img, config.llm
    caps = [
        f"{place} logits capped at {cap:g}"
        for place, cap in (
            ("attention", llm.attn_logit_softcap), ("output", llm.final_logit_softcap)
        )
        if cap
    ]  # fmt: skip
    lines = [
        _describe_line("image encoder", encoder_name(img)),
        _describe_line(
            "", f"{img.depth} layers, width {img.width}, MLP {img.mlp_dim}, {img.num_heads} heads"
        ),
        _describe_line(
            "picture",
            f"{img.image_size} x {img.image_size} pixels, {img.num_patches:,} image tokens",
        ),
        _describe_line("decoder", decoder_name(llm)),
        _describe_line(
            "",
            f"{llm.depth} layers, width {llm.width}, MLP {llm.mlp_dim}, {llm.num_heads} heads and "
            f"{llm.num_kv_heads} key-value of {llm.head_dim}",
        ),
        _describe_line("vocabulary", f"{llm.vocab_size:,} pieces"),
        _describe_line(
            "text length", f"{config.text_length} tokens of prompt and answer, as trained"
        ),
    ]
    if caps:
        lines.append(_describe_line("soft-caps", ", ".join(caps)))
    if llm.sliding_window:
        lines.append(
            _describe_line("sliding window", f"{llm.sliding_window:,} tokens on even layers")
        )
    return lines


def _describe_checkpoint(info: "CheckpointInfo") -> list[str]:
    image = info.processor["image"]
    dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in info.dtypes.items())
    codec = "present" if info.has_mask_codec else "missing; segment takes it as --mask-codec"
    return [
        _describe_line("checkpoint", f"{_KINDS[info.kind]}, {data_size(info.nbytes)} of weights"),
        _describe_line("stored", dtypes),
        *_few_bits(info),
        _describe_line(
            "tokenizer", "present" if info.has_tokenizer else "missing; pass it as --tokenizer"
        ),
        _describe_line("mask codec", codec),
        _describe_line(
            "preprocessing", f"pictures {image['method']} to {image['size']} pixels a side,"
        ),
        _describe_line("", f"prompts encoded by the rule of {info.processor['encoding']}"),
    ]


def _few_bits(info: "CheckpointInfo") -> list[str]:
    if info.quantization is None:
        return []
    words = []
    for kind, name in info.quantization.to_dict().items():
        format, _, group = (name or "as trained").partition(":")
        groups = {"": "", "row": ", a scale a channel"}.get(group, f" in groups of {group}")
        words.append(f"{kind} {format}{groups}")
    calibrated = info.origin.get("calibrated")
    scales = f"{data_size(info.scale_nbytes)} of scales"
    return [
        _describe_line("quantized", "; ".join(words)),
        _describe_line(
            "", scales if calibrated is None else f"{scales}; calibrated on {calibrated}"
        ),
    ]


def _parameters(config: PaliGemmaConfig) -> list[str]:
    counts = parameter_counts(config)
    lines = [f"  {part:<16}{count:>16,}" for part, count in counts.items()]
    return ["parameters", *lines, f"  {'total':<16}{sum(counts.values()):>16,}"]


def _memory(config: PaliGemmaConfig) -> list[str]:
    lines = ["memory                     weights   KV cache of 1,000 tokens"]
    for name, size in weight_bytes(config).items():
        cache = 1000 * cache_bytes_per_token(config.llm, _cache_bits(PRECISIONS[name]))
        lines.append(f"  {name:<16}{data_size(size):>16}   {data_size(cache)}")
    lines.append(
        "  int8 and int4 are weights without their scales, beside a bfloat16 cache:\n"
        "  --quantize int8"
    )
    return lines


def _cache_bits(weight_bits: int) -> int:
    """Keys and values are kept in the activations' dtype, which is no integer."""
    return max(16, weight_bits)


_models_EPILOG = """\
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


def add_models(commands: Any) -> None:
    """Adds the parsers of both commands."""
    parser = options.add_command(
        commands,
        "models",
        run_models,
        "list the published models",
        "Lists the published models: size, resolution, memory, whether they are downloaded, "
        "score, and what each is for.",
        _models_EPILOG,
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


def run_models(args: argparse.Namespace) -> int:
    """`paligemma models`; returns the exit code."""
    from paligemma_jax.hub.catalogue import MODELS

    entries = [entry for entry in MODELS.values() if _is_meant(entry, args.words)]
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
    from paligemma_jax.hub.catalogue import find_location
    from paligemma_jax.hub.download import download as fetch
    from paligemma_jax.loading import find_checkpoint

    source = find_location(args.model, args.revision)
    if source is None:
        path = find_checkpoint(args.model)  # demo, a path, or an error
    else:
        with byte_bar(args, f"downloading {source}") as progress:
            path = fetch(source, progress, refresh=True)
    print(path)
    return 0


def _is_meant(entry: "ModelInfo", words: list[str]) -> bool:
    text = f"{entry.name} {entry.use} {' '.join(entry.aliases)}".lower()
    return all(word.lower().removeprefix("google/") in text for word in words)


def _row(entry: "ModelInfo") -> dict[str, Any]:
    from paligemma_jax.hub.catalogue import OPEN_COPIES
    from paligemma_jax.hub.download import cached, cached_locations
    from paligemma_jax.weights.sidecar_files import parameter_counts, weight_bytes

    sources = cached_locations(entry)
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
    from paligemma_jax.hub.catalogue import MODELS

    columns = [
        ("name", [row["name"] for row in rows]),
        ("size", [row["size"] for row in rows]),
        ("pixels", [str(row["resolution"]) for row in rows]),
        ("memory", [data_size(row["memory_bytes"]["bfloat16"]) for row in rows]),
        ("cached", ["yes" if row["cached"] else "" for row in rows]),
    ]
    widths = [max(len(title), *map(len, cells)) for title, cells in columns]
    scores = (MODELS[row["name"]].score for row in rows)
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
