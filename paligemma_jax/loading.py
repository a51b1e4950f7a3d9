"""From the name of a checkpoint to a pipeline, a model, or a processor."""

import dataclasses
import difflib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.filesystem import user_cache
from paligemma_jax.generation.config import from_hugging_face
from paligemma_jax.hub.catalogue import find_location, find_model
from paligemma_jax.hub.download import cached, download
from paligemma_jax.models.inference_layout import unstack_layers
from paligemma_jax.models.paligemma import PaliGemma, from_params
from paligemma_jax.models.quantization import quantize_in_place
from paligemma_jax.models.quantization_config import Quantization, QuantizationConfig
from paligemma_jax.models.sharding import Axes, leaf_sharding, local_mesh, shard_model
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.processor import Processor
from paligemma_jax.weights.checkpoint import Checkpoint, open_checkpoint
from paligemma_jax.weights.load import load_stacked, load_unstacked
from paligemma_jax.weights.peft import load_adapter
from paligemma_jax.weights.tensors import DTypeLike, Progress, TensorSpec, as_float_dtype

DEMO = "demo"
_PACKAGE = Path(__file__).resolve().parent


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = "bfloat16",
    resolution: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    mask_codec: str | os.PathLike[str] | None = None,
    config: PaliGemmaConfig | None = None,
    quantize: Quantization | str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    mesh: Mesh | Axes | None = None,
    progress: Progress | None = None,
) -> Pipeline:
    """Loads a checkpoint of any format, with the preprocessing it was trained with.

    The model comes in the layout for inference, its layers separate (see `unstack_layers`); to
    train one, call `load_model`. Functions that JAX compiles from now on are kept in the user's
    cache directory, unless JAX has a directory for them already;
    JAX_ENABLE_COMPILATION_CACHE=false keeps none.

    Args:
      name_or_path: "demo", a Hugging Face directory, a big_vision .npz, or a directory written by
        `paligemma convert` or `Pipeline.save`; or what is downloaded once into the cache of its
        hub: a published name ("paligemma2-3b-mix-448") or alias, a repository at Hugging Face, a
        handle at Kaggle, an address (https, gs). `paligemma models` lists the published ones.
      dtype: of weights and activations: "bfloat16", or "float32" for parity (on CPUs for speed).
      resolution: resample the position embeddings to images of so many pixels a side.
      tokenizer: a tokenizer.model, for an .npz that has none beside it.
      mask_codec: an npz of the codec of <seg> tokens, where none lies beside the weights; the
        published one is vae-oid.npz.
      config: the architecture, where the file cannot tell it.
      quantize: "int8", "int4", "float8", "mixed", formats by kind of weight such as
        "mlp=int4:128,embedding=int8", or an `Int8`, `Int8Dynamic`, `Int4`, `Float8` or
        `QuantizationConfig`: weights are quantized as they are read, and those of bfloat16 or
        float32 are never held together. Activations keep `dtype`. A checkpoint that is stored
        quantized stays so.
      adapter: a directory of PEFT's (LoRA), added to the weights before they are quantized.
      revision: a branch, tag or commit at Hugging Face, such as "bfloat16".
      mesh: several devices of this process to run on together: `Axes(tensor=4)`, of all devices,
        or a mesh with axes named "data", "fsdp" and "tensor", or some of them. Weights are read
        straight onto them, each its own shard: attention heads (inputs where heads do not divide),
        inputs of the MLP's weights and rows of the embedding table over "tensor", what is left of
        large weights over "fsdp" (see `models.sharding`). An axis of a weight that does not divide
        stays whole. A batch is split over "data" and "fsdp" where its size divides. Results
        are those of one device.
      progress: called with what is being downloaded or read, bytes done and bytes in all.

    Raises:
      CheckpointError: naming everything that does not match, or what keeps it from being
        downloaded.
      MissingExtraError: where the client of a hub is needed and not installed.
      ConfigError: for an unknown quantization, and a mesh that has other axes, more or fewer
        devices than there are, or devices of other processes.
    """
    devices = None if mesh is None else local_mesh(mesh)
    quantization = None if quantize is None else QuantizationConfig.of(quantize)
    enable_compilation_cache()
    path = find_checkpoint(name_or_path, revision=revision, progress=progress)
    name = as_float_dtype(dtype).name
    with open_checkpoint(
        path, config=config, tokenizer=tokenizer, mask_codec=mask_codec
    ) as checkpoint:
        processor = processor_of(checkpoint, resolution)
        vae = checkpoint.mask_codec
        generation = from_hugging_face(checkpoint.origin.get("generation_config", {}), path)
        if quantization is not None and checkpoint.quantization != quantization:
            checkpoint.require_floats()
        if adapter is None:
            model = load_unstacked(
                checkpoint,
                name,
                resolution=resolution,
                quantize=quantization,
                mesh=devices,
                progress=progress,
            )
        else:
            base = _load_base(checkpoint, resolution, name, devices, progress)
            model = unstack_layers(load_adapter(base, adapter))
            if quantization is not None:
                quantize_in_place(model, quantization)
            if devices is not None:
                model = shard_model(model, devices)
    return Pipeline(model, processor, None if vae is None else MaskCodec(vae), generation)


def _load_base(
    checkpoint: Checkpoint,
    resolution: int | None,
    dtype: str,
    mesh: Mesh | None,
    progress: Progress | None,
) -> PaliGemma:
    """The model for adapters, its layers stacked."""

    def on_mesh(name: str, spec: TensorSpec) -> tuple[np.dtype, NamedSharding]:
        found = dataclasses.replace(spec, dtype=as_float_dtype(dtype))
        assert mesh is not None
        return found.dtype, leaf_sharding(name, found, mesh)

    config, params = load_stacked(
        checkpoint,
        dtype,
        resolution=resolution,
        placement=None if mesh is None else on_mesh,
        progress=progress,
    )
    return from_params(config, params, dtype)


def load_model(
    path: str | os.PathLike[str],
    config: PaliGemmaConfig | None = None,
    dtype: DTypeLike = "bfloat16",
) -> PaliGemma:
    """The model alone, without a tokenizer; `config` is inferred where the file can tell it.

    Its layers are stacked, as training wants them; `unstack_layers` makes inference faster.
    """
    enable_compilation_cache()
    with open_checkpoint(find_checkpoint(path), config=config) as checkpoint:
        return _load_base(checkpoint, None, as_float_dtype(dtype).name, None, None)


def load_processor(path: str | os.PathLike[str]) -> Processor:
    """The processor alone: tokenizer, image preprocessing and text encoding of a checkpoint."""
    with open_checkpoint(find_checkpoint(path)) as checkpoint:
        return processor_of(checkpoint, None)


def processor_of(checkpoint: Checkpoint, resolution: int | None) -> Processor:
    """That of an opened checkpoint, for images of `resolution` pixels if given."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise CheckpointError(
            f"There is no tokenizer beside {checkpoint.path}. Copy PaliGemma's tokenizer.model "
            "there, or pass tokenizer='tokenizer.model' (--tokenizer tokenizer.model)"
        )
    processor = Processor.from_dict(checkpoint.processor_settings, tokenizer)
    if resolution is None:
        return processor
    image = dataclasses.replace(processor.image, size=resolution)
    return dataclasses.replace(processor, image=image)


def published_name(name: str) -> str | None:
    """The name in `VARIANTS` of a published model, called by any name that it has at any hub."""
    for prefix in ("hf://", "kaggle://"):
        name = name.removeprefix(prefix)
    model = find_model(name.partition("@")[0])
    return None if model is None else model.name


def find_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    local_only: bool = False,
) -> Path:
    """Path of the demo model, of a checkpoint on disk, or of one from a hub, downloaded if needed.

    Args:
      name_or_path: a path; "demo"; a published name or any of its aliases; "owner/name" at Hugging
        Face; a handle at Kaggle; an address (https, gs, hf, kaggle). A path that exists goes first.
      revision: a branch, tag or commit at Hugging Face; "NAME@REVISION" is the same.
      progress: called with what is being downloaded, bytes done and bytes in all.
      local_only: take what is in the cache, and ask no hub.

    Raises:
      CheckpointError: for what cannot be downloaded, saying what to do, and for anything unknown,
        with the names that look like it.
      MissingExtraError: where the client of the hub is not installed.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name == DEMO and not path.exists():
        return demo_checkpoint()
    if path.exists():
        if revision is not None:
            raise CheckpointError(
                f"{path} is a path here, which has no revisions. Leave the revision out, or ask "
                f"for a repository at Hugging Face: hf://{name}"
            )
        return path
    location = find_location(name, revision)
    if location is not None:
        found = cached(location) if local_only else download(location, progress)
        if found is not None:
            return found
        raise CheckpointError(
            f"{name} is neither here nor in the cache. Run: paligemma download {name}"
        )
    known = [DEMO, *VARIANTS]
    near = difflib.get_close_matches(name.removeprefix("google/").lower(), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near and name.count(os.sep) < 2 else ""
    raise CheckpointError(
        f"{name} is not a file, a directory or a known model.{hint} Expected a path, a published "
        'name such as paligemma2-3b-mix-448, or "demo". See: paligemma models'
    )


def enable_compilation_cache() -> None:
    """Has JAX keep compiled functions in the user's cache directory, for all of this process.

    Nothing changes where JAX knows a directory already (jax.config, JAX_COMPILATION_CACHE_DIR) or
    keeps nothing (JAX_ENABLE_COMPILATION_CACHE=false). Loading a model calls this.
    """
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    directory, enabled = (getattr(jax.config, name) for name in names)
    if directory or not enabled:
        return
    directory = user_cache() / _machine()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written to: every process compiles
    jax.config.update("jax_compilation_cache_dir", str(directory))
    seconds = "jax_persistent_cache_min_compile_time_secs"
    if getattr(jax.config, seconds) == 1.0:  # JAX's default
        jax.config.update(seconds, 0.0)
    # An entry that cannot be read or written costs time, not correctness.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")


def _machine() -> str:
    """One directory a processor type: code compiled for another, in a shared home, could crash."""
    kind = [platform.node(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind += next(([line] for line in lines if line.startswith(("flags", "Features"))), [])
    except OSError:
        pass
    return hashlib.sha256("\n".join(kind).encode()).hexdigest()[:16]


def demo_checkpoint(package: Path = _PACKAGE) -> Path:
    """Directory of the demo checkpoint, given that of the package; raises CheckpointError."""
    # A wheel carries checkpoints/ inside the package; a checkout and an editable install have it
    # beside the package, as in the repository.
    places = [parent / "checkpoints" / "demo" for parent in (package, package.parent)]
    for place in places:
        if (place / "params").is_dir():
            return place
    raise CheckpointError(
        f"expected the demo checkpoint in {places[0]} or {places[1]}, found neither. "
        "Install again: pip install --force-reinstall paligemma-jax"
    )
