"""Hugging Face directories, read and written: config.json and safetensors in any key layout.

`hf_tensors` is the one table of names and layouts, read in both directions. Facts: transformers'
PaliGemma conversion scripts. A PyTorch Linear weight is (out, in), heads are merged into one axis,
and every layer has tensors of its own.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.weights.formats import CheckpointFormat, CheckpointMetadata, CheckpointReader
from paligemma_jax.weights.hf_config import (
    CONFIG,
    GENERATION_CONFIG,
    HFConfig,
    hf_config,
    hf_generation,
    hf_preprocessor,
    padded_rows,
    read_hf_generation,
)
from paligemma_jax.weights.hf_tokenizer import tokenizer_files
from paligemma_jax.weights.safetensors_io import SafeTensor, ShardWriter, read_tensors, write_shards
from paligemma_jax.weights.sidecar_files import (
    MASK_CODEC,
    hugging_face_processor,
    with_text_length,
    write_checksums,
)
from paligemma_jax.weights.tensors import (
    EMBEDDING_TABLES,
    FLOATS,
    Shape,
    TensorSource,
    TensorSpec,
    aligned_empty,
    chunk_places,
    chunk_shapes,
    copy_into,
    expected_shapes,
    largest_first,
    read_chunks,
    shape_problems,
    validation_error,
)

EMBEDDING = "language_model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

Axes = tuple[tuple[int, ...], ...]
_SAME: Axes = ((0,),)
_PLAIN: Axes = ((0,), (1,))
_TRANSPOSED: Axes = ((1,), (0,))


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One Hugging Face tensor as a part of one of ours.

    Attributes:
      key: canonical name (see `canonical_key`), `{}` standing for the layer.
      path: ours.
      axes: for each of its axes, the axes of ours (layer and part removed) that it merges.
      part: index on our leading axis where ours joins two of theirs (k and v, gate and up).
    """

    key: str
    path: str
    axes: Axes
    part: int | None = None

    @property
    def layered(self) -> bool:
        return "{}" in self.key

    def shape(self, ours: Shape) -> Shape:
        """Its shape in their layout, given the shape of ours without layer and part."""
        return tuple(math.prod(ours[axis] for axis in group) for group in self.axes)

    @property
    def order(self) -> list[int]:
        """The axes of ours in the order of theirs."""
        return [axis for group in self.axes for axis in group]

    def to_ours(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        """View of their array in our axis order, `ours` being that shape."""
        view = theirs.reshape([ours[axis] for axis in self.order])
        return view.transpose(np.argsort(self.order))

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """C-order array in their layout; the memory of `ours` if it lies in that order."""
        return np.ascontiguousarray(ours.transpose(self.order)).reshape(self.shape(ours.shape))


def canonical_key(key: str) -> str:
    """One name for a tensor whichever of the four layouts in the wild it comes from.

    They differ in a leading `model.`, in where the decoder is, and in `vision_model.`.
    """
    key = key.removeprefix("model.")
    key = re.sub(r"^language_model\.lm_head\.", "lm_head.", key)
    key = re.sub(r"^language_model\.model\.", "language_model.", key)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", key)


def published_key(key: str) -> str:
    """The name in the published repositories, which all versions read, of a canonical one."""
    key = re.sub(r"^language_model\.", "language_model.model.", key)
    key = re.sub(r"^lm_head\.", "language_model.lm_head.", key)
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", key)


def hf_tensors(config: PaliGemmaConfig) -> list[HFTensor]:
    """The tensors that a checkpoint of `config` has, the embedding's filler rows apart."""
    return [*_vision_tensors(), *_text_tensors(config)]


def _vision_tensors() -> Iterator[HFTensor]:
    embeddings, layer = "vision_tower.embeddings", "vision_tower.encoder.layers.{}"
    patch = "img/patch_embed"
    yield HFTensor(
        f"{embeddings}.patch_embedding.weight", f"{patch}/kernel", ((3,), (2,), (0,), (1,))
    )
    yield HFTensor(f"{embeddings}.patch_embedding.bias", f"{patch}/bias", _SAME)
    yield HFTensor(f"{embeddings}.position_embedding.weight", "img/pos_embed", ((0, 1), (2,)))
    for n in (1, 2):
        yield from _norm(f"{layer}.layer_norm{n}", f"img/blocks/norm{n}")
    for projection in ("q", "k", "v"):
        theirs, ours = f"{layer}.self_attn.{projection}_proj", f"img/blocks/attn/{projection}"
        yield HFTensor(f"{theirs}.weight", f"{ours}/kernel", ((1, 2), (0,)))
        yield HFTensor(f"{theirs}.bias", f"{ours}/bias", ((0, 1),))
    out = f"{layer}.self_attn.out_proj"
    yield HFTensor(f"{out}.weight", "img/blocks/attn/out/kernel", ((2,), (0, 1)))
    yield HFTensor(f"{out}.bias", "img/blocks/attn/out/bias", _SAME)
    for fc in ("fc1", "fc2"):
        yield HFTensor(f"{layer}.mlp.{fc}.weight", f"img/blocks/mlp/{fc}/kernel", _TRANSPOSED)
        yield HFTensor(f"{layer}.mlp.{fc}.bias", f"img/blocks/mlp/{fc}/bias", _SAME)
    yield from _norm("vision_tower.post_layernorm", "img/norm")
    projector = "multi_modal_projector.linear"
    yield HFTensor(f"{projector}.weight", "img/head/kernel", _TRANSPOSED)
    yield HFTensor(f"{projector}.bias", "img/head/bias", _SAME)


def _text_tensors(config: PaliGemmaConfig) -> Iterator[HFTensor]:
    layer, ours = "language_model.layers.{}", "llm/layers"
    yield HFTensor(EMBEDDING, "llm/embedder/input_embedding", _PLAIN)
    attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    per_head: Axes = ((0, 2), (1,))
    yield HFTensor(f"{attn}.q_proj.weight", f"{ours}/attn/q_einsum/w", per_head)
    for part, projection in enumerate(("k", "v")):
        yield HFTensor(
            f"{attn}.{projection}_proj.weight", f"{ours}/attn/kv_einsum/w", per_head, part
        )
    yield HFTensor(f"{attn}.o_proj.weight", f"{ours}/attn/attn_vec_einsum/w", ((2,), (0, 1)))
    for part, name in enumerate(("gate", "up")):
        yield HFTensor(
            f"{mlp}.{name}_proj.weight", f"{ours}/mlp/gating_einsum/w", _TRANSPOSED, part
        )
    yield HFTensor(f"{mlp}.down_proj.weight", f"{ours}/mlp/linear/w", _TRANSPOSED)
    # One name, two roles: Gemma's post_attention_layernorm is the norm before the MLP.
    norms = {"input_layernorm": "pre_attention_norm"}
    if config.llm.post_norms:
        norms["post_attention_layernorm"] = "post_attention_norm"
        norms["pre_feedforward_layernorm"] = "pre_ffw_norm"
        norms["post_feedforward_layernorm"] = "post_ffw_norm"
    else:
        norms["post_attention_layernorm"] = "pre_ffw_norm"
    for theirs, name in norms.items():
        yield HFTensor(f"{layer}.{theirs}.weight", f"{ours}/{name}/scale", _SAME)
    yield HFTensor("language_model.norm.weight", "llm/final_norm/scale", _SAME)
    if not config.llm.tie_embeddings:
        yield HFTensor(LM_HEAD, "llm/lm_head/w", _PLAIN)


def _norm(theirs: str, ours: str) -> Iterator[HFTensor]:
    yield HFTensor(f"{theirs}.weight", f"{ours}/scale", _SAME)
    yield HFTensor(f"{theirs}.bias", f"{ours}/bias", _SAME)


def part_shape(tensor: HFTensor, ours: Shape) -> Shape:
    """Shape of the part of ours that `tensor` is: without layer axis and without joined axis."""
    return ours[int(tensor.layered) + int(tensor.part is not None) :]


def hf_shapes(config: PaliGemmaConfig) -> dict[str, Shape]:
    """Canonical name and shape of every tensor of a checkpoint of `config`, filler rows apart."""
    ours = expected_shapes(config)
    shapes = {}
    for tensor in hf_tensors(config):
        shape = tensor.shape(part_shape(tensor, ours[tensor.path]))
        for layer in range(ours[tensor.path][0] if tensor.layered else 1):
            shapes[tensor.key.format(layer)] = shape
    return shapes


_BLOCK = 16 << 20  # bytes of a table in memory while it is compared or cast


class HuggingFaceReader(CheckpointReader):
    """A Hugging Face directory.

    Filler rows of the embedding table, from the image placeholder on, are dropped. A head that
    differs from the table in the rows kept is kept as "llm/lm_head/w", even where config.json calls
    it tied; an equal one is dropped. The sliding window that config.json asks for is in `origin`,
    not in `config`, as big_vision has none. A given `config` replaces the file's and must match
    the tensors.
    """

    kind = "huggingface"

    def __init__(self, path: Path, config: PaliGemmaConfig | None = None):
        self.path = path
        described = HFConfig(path / CONFIG)
        self.origin: dict[str, Any] = {
            "kind": self.kind,
            "sliding_window": described.sliding_window,
        }
        if generation := read_hf_generation(path):
            self.origin["generation_config"] = generation
        self._tensors = _canonical(path, read_tensors(path))
        if config is None:
            table = self._tensors.get(EMBEDDING)
            rows = table.shape[0] if table and len(table.shape) == 2 else 1
            size = min(described.vocab_size or rows, rows)
            untied = not described.tied or LM_HEAD in self._tensors
            untied = untied and self._head_differs(size)
            config = described.to_config(size, tie_embeddings=not untied)
            config = with_text_length(config, path)
        self.config = config
        self._validate(config)
        self._parts: dict[str, list[HFTensor]] = {}
        for tensor in hf_tensors(config):
            self._parts.setdefault(tensor.path, []).append(tensor)
        self.specs = {
            name: TensorSpec(shape, self._dtype(name, shape))
            for name, shape in expected_shapes(config).items()
        }

    def processor_settings(self) -> dict[str, Any]:
        return hugging_face_processor(self.path, self.config)

    def _head_differs(self, rows: int) -> bool:
        head, table = self._tensors.get(LM_HEAD), self._tensors.get(EMBEDDING)
        if head is None or table is None or not (head.dtype and table.dtype):
            return True  # the validation of the tensors tells what is wrong
        if head.shape != table.shape or len(table.shape) != 2:
            return True
        step = max(1, _BLOCK // (4 * table.shape[1]))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            a, b = head.read(part), table.read(part)
            if head.dtype != table.dtype:
                a, b = a.astype(np.float32), b.astype(np.float32)
            if a.tobytes() != b.tobytes():
                return True
        return False

    def _validate(self, config: PaliGemmaConfig) -> None:
        found = {name: tensor.shape for name, tensor in self._tensors.items()}
        expected = hf_shapes(config)
        if config.llm.tie_embeddings:
            found.pop(LM_HEAD, None)
        for table in (EMBEDDING, LM_HEAD):  # more rows than pieces are filler
            if table in found and table in expected and found[table][:1] > expected[table][:1]:
                found[table] = (expected[table][0], *found[table][1:])
        problems = shape_problems(found, expected)
        problems += [
            f"dtype       {name}: {self._tensors[name].kind}, model F32, F16 or BF16"
            for name in expected
            if name in found and self._tensors[name].dtype is None
        ]
        if problems:
            raise validation_error(self.path, problems)

    def _dtype(self, name: str, shape: Shape) -> np.dtype:
        """The dtype all tensors of one of ours share; float32 where they differ or are 64-bit."""
        kinds = {
            self._tensors[tensor.key.format(layer)].dtype
            for tensor in self._parts[name]
            for layer in range(shape[0] if tensor.layered else 1)
        }
        (kind,) = kinds if len(kinds) == 1 else (None,)
        return FLOATS["float32"] if kind is None or kind == FLOATS["float64"] else kind

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        place = chunk_places(name, self.specs[name].shape)[index]
        rows = place if isinstance(place, slice) else slice(None)
        for tensor in self._parts[name]:
            file = self._tensors[tensor.key.format(index)]
            _read_part(tensor, file, rows, out if tensor.part is None else out[tensor.part])

    def read_slice(
        self, name: str, index: int, part: tuple[slice, ...], dtype: np.dtype
    ) -> np.ndarray:
        shape = self.specs[name].shape
        chunk, place = chunk_shapes(name, shape)[index], chunk_places(name, shape)[index]
        rows = place if isinstance(place, slice) else slice(None)
        sizes = (len(range(n)[side]) for n, side in zip(chunk, part, strict=True))
        result = aligned_empty(tuple(sizes), dtype)
        for tensor in self._parts[name]:
            file = self._tensors[tensor.key.format(index)]
            if tensor.part is None:
                copy_into(result, tensor.to_ours(file.map()[rows], chunk)[part])
            elif tensor.part in range(chunk[0])[part[0]]:
                own = tensor.to_ours(file.map(), chunk[1:])[part[1:]]
                copy_into(result[tensor.part - (part[0].start or 0)], own)
        return result


def _read_part(tensor: HFTensor, file: SafeTensor, rows: slice, target: np.ndarray) -> None:
    if not target.transpose(tensor.order).flags.c_contiguous:  # another order in memory
        copy_into(target, tensor.to_ours(file.read(rows), target.shape))
        return
    theirs = tensor.to_theirs(target)
    first = rows.start or 0
    if file.dtype == target.dtype:
        file.read(slice(first, first + len(theirs)), out=theirs)
        return
    step = max(1, _BLOCK // (theirs.nbytes // len(theirs)))
    for start in range(0, len(theirs), step):
        stop = min(start + step, len(theirs))
        copy_into(theirs[start:stop], file.read(slice(first + start, first + stop)))


def _canonical(path: Path, tensors: dict[str, SafeTensor]) -> dict[str, SafeTensor]:
    result: dict[str, SafeTensor] = {}
    origin: dict[str, str] = {}
    problems = []
    for key, tensor in tensors.items():
        if key.endswith((".position_ids", ".rotary_emb.inv_freq")):
            continue  # constants that old versions saved along
        name = canonical_key(key)
        if name in result:
            problems.append(f"duplicate   {key} and {origin[name]} are the same tensor")
        result[name], origin[name] = tensor, key
    if problems:
        raise validation_error(path, problems)
    return result


@dataclasses.dataclass(frozen=True)
class HuggingFace(CheckpointFormat):
    """A directory as `save_pretrained` writes it, in the layout of the published repositories.

    All versions of transformers that know the model load it, and so do Roboflow's `deploy` and
    other programs that take such a directory. Files are of at most `shard_bytes`.
    """

    name: ClassVar[str] = "huggingface"
    shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ConfigError(
                f"shard_bytes must be a positive number of bytes, got {self.shard_bytes}. Pass for "
                "example HuggingFace(shard_bytes=5_000_000_000)"
            )

    def check(self, target: Path, source: TensorSource) -> None:
        hf_config(source.config, "float32", None)

    def write(self, target: Path, source: TensorSource, metadata: CheckpointMetadata) -> None:
        config = source.config
        dtype = Counter(spec.dtype.name for spec in source.specs.values()).most_common(1)[0][0]
        window = metadata.origin.get("sliding_window")
        settings = {
            "config.json": hf_config(config, dtype, window),
            GENERATION_CONFIG: hf_generation(config) | metadata.origin.get("generation_config", {}),
            "preprocessor_config.json": hf_preprocessor(config),
        }
        for name, values in settings.items():
            (target / name).write_text(json.dumps(values, indent=2) + "\n")
        _write_tokenizer(target, metadata)
        if metadata.mask_codec is not None:
            (target / MASK_CODEC).write_bytes(metadata.mask_codec)
        parts: dict[str, list[HFTensor]] = {name: [] for name in largest_first(source.specs)}
        for tensor in hf_tensors(config):
            parts[tensor.path].append(tensor)
        with write_shards(target, _specs(source), self.shard_bytes) as shards:
            for name, tensors in parts.items():
                if name in EMBEDDING_TABLES:
                    _write_table(shards, source, tensors[0])
                else:
                    _write_layers(shards, source, tensors)
        write_checksums(target)


def _write_tokenizer(directory: Path, metadata: CheckpointMetadata) -> None:
    model = metadata.tokenizer or b""
    (directory / "tokenizer.model").write_bytes(model)
    if "tokenizer.json" in metadata.tokenizer_files:  # as they were published
        for name, path in metadata.tokenizer_files.items():
            (directory / name).write_bytes(path.read_bytes())
        return
    for name, values in tokenizer_files(model).items():
        text = json.dumps(values, ensure_ascii=False, indent=2 if len(values) < 20 else None)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _specs(source: TensorSource) -> dict[str, TensorSpec]:
    """All their tensors by published name, layer after layer as the model has them."""
    specs: dict[str, TensorSpec] = {}
    for tensor in hf_tensors(source.config):
        ours = source.specs[tensor.path]
        shape = tensor.shape(part_shape(tensor, ours.shape))
        if tensor.path in EMBEDDING_TABLES:
            shape = (padded_rows(shape[0]), *shape[1:])
        for layer in range(ours.shape[0] if tensor.layered else 1):
            specs[published_key(tensor.key.format(layer))] = TensorSpec(shape, ours.dtype)
    return dict(sorted(specs.items(), key=lambda item: _natural(item[0])))


def _natural(key: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _write_layers(shards: ShardWriter, source: TensorSource, tensors: list[HFTensor]) -> None:
    """One of our parameters, whose layers are read into where theirs lie in memory."""
    path, first = tensors[0].path, tensors[0]
    spec = source.specs[path]
    chunks = chunk_shapes(path, spec.shape)
    joined = first.part is not None  # several of theirs are one of ours
    inner = chunks[0][1:] if joined else chunks[0]
    theirs = aligned_empty((len(tensors), *first.shape(inner)), spec.dtype)
    # View of their tensors, joined on a first axis as ours joins them.
    view = theirs.reshape([len(tensors), *(inner[axis] for axis in first.order)])
    ours = view.transpose([0, *(1 + int(axis) for axis in np.argsort(first.order))])
    for layer in range(len(chunks)):
        source.read_chunk(path, layer, ours if joined else ours[0])
        for tensor, array in zip(tensors, theirs, strict=True):
            shards.write(published_key(tensor.key.format(layer)), array)


def _write_table(shards: ShardWriter, source: TensorSource, tensor: HFTensor) -> None:
    """An embedding table, padded with its mean row, which is never the most probable token."""
    key, spec = published_key(tensor.key), source.specs[tensor.path]
    rows, width = spec.shape
    total = np.zeros(width, np.float64)
    row = 0
    for (buffer,) in read_chunks(source, [tensor.path]):
        shards.write(key, buffer, row)
        total += buffer.astype(np.float32).sum(axis=0, dtype=np.float64)
        row += len(buffer)
        del buffer
    filler = np.empty((padded_rows(rows) - rows, width), spec.dtype)
    filler[:] = (total / rows).astype(spec.dtype)
    shards.write(key, filler, row)
