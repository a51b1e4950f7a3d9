"""Numbers of a run while it goes: metrics.jsonl, TensorBoard, Weights & Biases, progress, rates."""

import contextlib
import json
import math
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import MissingExtraError

METRICS = "metrics.jsonl"
Progress = Callable[[int, int, Mapping[str, float]], None]  # step, steps in all, newest numbers


class JsonLines:
    """One JSON object per line and step: {"step": 10, "loss": 1.5}; NaN and infinities as text.

    A run that continues from an earlier step drops the lines after it, so that no step comes twice.
    Every line is flushed: after a kill all but the last one are there.
    """

    def __init__(self, path: Path, after: int = 0):
        kept = [line for line in read_metrics(path) if line["step"] <= after]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(map(_to_json, kept)))
        os.replace(beside, path)
        self._file = path.open("a")
        self.close = self._file.close

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(_to_json({"step": step, **values}))
        self._file.flush()


class TensorBoard:
    """Event files for `tensorboard --logdir WORKDIR`; MissingExtraError without tensorboardX."""

    def __init__(self, directory: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as e:
            raise MissingExtraError("Writing for TensorBoard", "train") from e
        self._writer = SummaryWriter(str(directory), flush_secs=30)
        self.close = self._writer.close

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


class WeightsAndBiases:
    """Reports to a project at wandb.ai, or to files alone with WANDB_MODE=offline.

    A run that continues in `directory` is the same run there. MissingExtraError without wandb.
    """

    def __init__(self, directory: Path, project: str, settings: Mapping[str, str]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise MissingExtraError("Reporting to Weights & Biases", "wandb") from e
        name = directory / "wandb_id"
        if not name.exists():
            name.write_text(uuid.uuid4().hex)
        options: dict[str, Any] = dict(project=project, config=dict(settings))
        self._run = wandb.init(
            dir=str(directory), id=name.read_text(), name=directory.name, resume="allow", **options
        )
        self.close = self._run.finish

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)


Writer = JsonLines | TensorBoard | WeightsAndBiases


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that was cut short by a kill is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            numbers = {k: float(v) if isinstance(v, str) else v for k, v in values.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        found.append({"step": step, **numbers})
    return found


def _to_json(values: Mapping[str, Any]) -> str:
    finite = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }
    return json.dumps(finite) + "\n"


@contextlib.contextmanager
def progress_display(bar: bool) -> Iterator[Progress]:
    """A bar with time left, or a line whenever there are new numbers, on standard error."""
    last: object = None

    def print_line(step: int, total: int, values: Mapping[str, float]) -> None:
        nonlocal last
        logged, before = values.get("samples_per_second"), last
        last = logged
        if logged != before or step == total:
            print(f"step {step}/{total} {_in_brief(values)}", file=sys.stderr, flush=True)

    if not bar:
        yield print_line
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets has a bar of text
        from tqdm.auto import tqdm

    with tqdm(unit="step", file=sys.stderr, smoothing=0.05) as shown:

        def update(step: int, total: int, values: Mapping[str, float]) -> None:
            shown.set_postfix_str(_in_brief(values), refresh=False)
            if shown.total is None:  # the first step was compiled, and tells nothing of the rest
                shown.reset(total)
                shown.initial = shown.n = step
                shown.refresh()
            else:
                shown.update(step - shown.n)

        yield update


def _in_brief(values: Mapping[str, float]) -> str:
    """The numbers of a step in one line."""
    texts = {
        "loss": "loss {:.4g}",
        "validation_loss": "validation {:.4g}",
        "samples_per_second": "{:.3g} samples/s",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.0%}",
    }
    return ", ".join(text.format(values[name]) for name, text in texts.items() if name in values)


# Dense bfloat16 (float16 on a T4), FLOP/s of one device, from the makers' tables.
_PEAKS: Mapping[str, float] = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "T4": 65e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61e12,
}


def peak_flops() -> float | None:
    """FLOP/s of one device at best; None where it is not known, as on CPUs."""
    kind = jax.devices()[0].device_kind.lower()
    return next((peak for name, peak in _PEAKS.items() if name.lower() in kind), None)


def training_flops(
    config: PaliGemmaConfig,
    text_length: int,
    *,
    images: int = 1,
    image_trained: bool = True,
    text_trained: bool = True,
) -> float:
    """FLOPs of one example's forward and backward pass, for the MFU (arXiv 2204.02311, B).

    What is computed twice to save memory counts once. `image_trained` and `text_trained` say
    whether the weights of the encoder and of the decoder (most of them) are trained; frozen weights
    need no gradients of their own, and a frozen encoder no backward pass.
    """
    img, llm = config.img, config.llm
    patches = img.num_patches
    weights = 4 * img.width * img.width + 2 * img.width * img.mlp_dim
    encoder = 2 * patches * img.depth * weights + 4 * patches**2 * img.width * img.depth
    encoder += 2 * patches * (3 * img.patch_size**2 * img.width + img.width * llm.width)
    tokens = images * patches + text_length
    weights = llm.width * llm.head_dim * (2 * llm.num_heads + 2 * llm.num_kv_heads)
    weights += 3 * llm.width * llm.mlp_dim
    decoder = 2 * tokens * llm.depth * weights
    decoder += 4 * tokens**2 * llm.num_heads * llm.head_dim * llm.depth
    decoder += 2 * text_length * llm.width * llm.vocab_size
    # Forward once; backward as much again for what lies before, and again for weights.
    return float(
        images * encoder * (3 if image_trained else 1) + decoder * (3 if text_trained else 2)
    )


class Throughput:
    """Rates over the steps since they were last asked for; pauses can be left out."""

    def __init__(self, batch_size: int, tokens: int = 0, flops: float = 0.0):
        self._batch_size, self._tokens, self._flops = batch_size, tokens, flops
        self.restart()

    def count_step(self) -> None:
        """One more step was made."""
        self._steps += 1

    def restart(self) -> None:
        """Forgets the steps so far; to be called after a pause."""
        self._start, self._steps = time.perf_counter(), 0

    def rates(self) -> dict[str, float]:
        """samples/s, tokens/s, seconds per step and, where the device is known, MFU (0 to 1)."""
        elapsed, steps = time.perf_counter() - self._start, self._steps
        self.restart()
        if not steps or elapsed <= 0:
            return {}
        samples = steps * self._batch_size / elapsed
        found = {"samples_per_second": samples, "seconds_per_step": elapsed / steps}
        if self._tokens:
            found["tokens_per_second"] = samples * self._tokens
        if self._flops and (peak := peak_flops()):
            found["mfu"] = samples * self._flops / (peak * jax.device_count())
        return found
