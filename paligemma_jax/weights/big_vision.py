"""big_vision's npz checkpoints, read and written array by array and layer by layer.

Names and shapes: google-research/big_vision, models/proj/paligemma and utils.py (commit 0127fb6):
keys of the tree joined with "/", below "params/"; bfloat16 is stored as 2-byte void, for numpy has
no name for it. The configuration is inferred from the shapes.

Not `np.load`: it reads whole arrays into fresh memory, believes any claimed size, and takes the
last of two arrays with one name. Pickled arrays are refused, since unpickling runs code.
"""

import contextlib
import dataclasses
import io
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from paligemma_jax.config import GEMMA2_27B, GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.errors import CheckpointError, ConfigError, problem_list
from paligemma_jax.weights.formats import CheckpointFormat, CheckpointMetadata, CheckpointReader
from paligemma_jax.weights.sidecar_files import (
    BIG_VISION_TOKENIZER,
    MASK_CODEC,
    PartsFile,
    big_vision_processor,
    with_text_length,
)
from paligemma_jax.weights.tensors import (
    BFLOAT16,
    FLOATS,
    Shape,
    TensorSource,
    TensorSpec,
    aligned_empty,
    as_bytes,
    chunk_shapes,
    copy_into,
    expected_shapes,
    read_chunks,
    shape_problems,
    validation_error,
)

_READ = 16 << 20  # bytes at once
_MAX_ARRAYS = 10_000
_MAX_INFLATION = 100  # weights compress to about half, a bomb of zeros to a thousandth
_FREE_INFLATION = 64 << 20  # bytes that any file may unpack to


@dataclasses.dataclass(frozen=True)
class NpzArray:
    """One array of the file; bfloat16, which numpy stores as 2-byte void, has its dtype again."""

    member: zipfile.ZipInfo
    header_size: int
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool


class NpzFile:
    """An npz file, whole or in parts; `arrays` maps names to shapes and dtypes.

    Opening reads headers only. Raises CheckpointError listing every array that cannot be read.
    """

    def __init__(self, path: Path, parts: list[Path]):
        self.path = path
        self._raw = PartsFile(parts)
        try:
            self._zip = zipfile.ZipFile(io.BufferedReader(self._raw, 1 << 20))
        except (zipfile.BadZipFile, ValueError, OSError) as e:
            problem = _sniff(self._raw, len(parts))
            self._raw.close()
            raise CheckpointError(
                f"{path} {problem}. Expected a whole npz file of big_vision's: download it again."
            ) from e
        self.arrays: dict[str, NpzArray] = {}
        problems = self._read_headers()
        if problems:
            self.close()
            raise CheckpointError(
                f"{path} cannot be read safely {problem_list(problems)}\n"
                "Expected plain float arrays, as big_vision writes them; nothing was unpickled. "
                "Download it again from where it was published."
            )

    def _read_headers(self) -> list[str]:
        members = self._zip.infolist()
        if len(members) > _MAX_ARRAYS:
            return [f"{len(members):,} arrays, more than any PaliGemma has"]
        unpacked = sum(member.file_size for member in members)
        if unpacked > _FREE_INFLATION + _MAX_INFLATION * self._raw.size:
            return [f"{self._raw.size:,} bytes claim to unpack to {unpacked:,}"]
        problems = []
        for member in members:
            name = member.filename.removesuffix(".npy")
            try:
                array = self._read_header(member)
            except Exception as e:  # untrusted bytes provoke many kinds
                problems.append(f"{member.filename}: {e}")
                continue
            if name in self.arrays:
                problems.append(f"{name}: two arrays have this name")
            self.arrays[name] = array
        return problems

    def _read_header(self, member: zipfile.ZipInfo) -> NpzArray:
        if not member.filename.endswith(".npy"):
            raise ValueError("not an array")
        if member.flag_bits & 1:
            raise ValueError("encrypted")
        with self._zip.open(member) as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                header = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                header = np.lib.format.read_array_header_2_0(file)
            else:
                raise ValueError(f"unknown npy version {version}")
            header_size = file.tell()
        shape, fortran_order, dtype = header
        if dtype.hasobject:
            raise ValueError("pickled objects, refused")
        if not dtype.isnative:
            raise ValueError("big-endian numbers")
        if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
            dtype = BFLOAT16
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or header_size + size != member.file_size:
            raise ValueError(
                f"shape {shape} takes {size:,} bytes, {member.file_size - header_size:,} are there"
            )
        return NpzArray(member, header_size, shape, dtype, fortran_order)

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """One array as aligned C order of `dtype`, cast block by block; raises CheckpointError."""
        result = aligned_empty(self.arrays[name].shape, dtype)
        with contextlib.closing(self.stream(name)) as stream:
            stream.read_into(result)
        return result

    def stream(self, name: str) -> "NpzStream":
        """Reads an array from its beginning to its end; raises CheckpointError."""
        return NpzStream(self, name, self._zip)

    def close(self) -> None:
        self._zip.close()
        self._raw.close()


class NpzStream:
    """One array of an npz file, a part of the first axis after the other; close it.

    Of an array in C order nothing is held but what is being copied; one in Fortran order is read
    at once.
    """

    def __init__(self, npz: NpzFile, name: str, archive: zipfile.ZipFile):
        self._path, self._name, self._array = npz.path, name, npz.arrays[name]
        self._whole: np.ndarray | None = None
        self._row = 0
        with self._one_error():
            self._file: IO[bytes] = archive.open(self._array.member)
            self._file.read(self._array.header_size)
            if self._array.fortran_order:
                stored = aligned_empty(self._array.shape[::-1], self._array.dtype)
                self._fill(as_bytes(stored))
                self._whole = stored.T

    def read_into(self, target: np.ndarray) -> None:
        """The next `target.size` entries, into an array of any strides, with a cast."""
        with self._one_error():
            dtype = self._array.dtype
            if self._whole is not None:
                is_layer = target.ndim < self._whole.ndim
                stop = self._row + (1 if is_layer else len(target))
                rows = self._whole[self._row : stop]
                copy_into(target, rows[0] if is_layer else rows)
                self._row = stop
            elif not target.flags.c_contiguous:
                part = np.empty(target.shape, dtype)
                self._fill(as_bytes(part))
                copy_into(target, part)
            elif dtype == target.dtype:
                self._fill(as_bytes(target))
            else:
                flat = target.reshape(-1)
                block = np.empty(_READ // dtype.itemsize, dtype)
                for start in range(0, flat.size, block.size):
                    part = flat[start : start + block.size]
                    self._fill(as_bytes(block[: part.size]))
                    copy_into(part, block[: part.size])

    def close(self) -> None:
        self._file.close()

    def _fill(self, buffer: memoryview) -> None:
        for start in range(0, len(buffer), _READ):
            part = buffer[start : start + _READ]
            data = self._file.read(len(part))
            if len(data) < len(part):
                raise EOFError("data ends early")
            part[:] = data

    @contextlib.contextmanager
    def _one_error(self) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as e:
            raise CheckpointError(
                f"{self._path} is damaged at {self._name}: {e}. Download it again."
            ) from e


def _sniff(raw: PartsFile, number_of_parts: int) -> str:
    """What a file that is not a zip seems to be."""
    raw.seek(0)
    start = raw.read(40) or b""
    if start.startswith(b"PK\x03\x04"):
        part = " or its last part is missing" if number_of_parts > 1 else ""
        return f"is truncated: {raw.size:,} bytes without the end of an npz file{part}"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the checkpoint itself (run: git lfs pull)"
    if start.startswith(b"\x80"):
        return "is a Python pickle, which is refused because loading one runs its code"
    return f"is not an npz file; it begins with {start!r}"


_PREFIXES = ("params/", "opt/target/", "")
_BLOCK = "img/Transformer/encoderblock"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_RENAMED = {
    "img/patch_embed": "img/embedding",
    "img/pos_embed": "img/pos_embedding",
    "img/blocks/norm1": f"{_BLOCK}/LayerNorm_0",
    "img/blocks/norm2": f"{_BLOCK}/LayerNorm_1",
    "img/blocks/attn/q": f"{_ATTENTION}/query",
    "img/blocks/attn/k": f"{_ATTENTION}/key",
    "img/blocks/attn/v": f"{_ATTENTION}/value",
    "img/blocks/attn/out": f"{_ATTENTION}/out",
    "img/blocks/mlp/fc1": f"{_BLOCK}/MlpBlock_0/Dense_0",
    "img/blocks/mlp/fc2": f"{_BLOCK}/MlpBlock_0/Dense_1",
    "img/norm": "img/Transformer/encoder_norm",
    "llm/layers/mlp/gating_einsum/w": "llm/layers/mlp/gating_einsum",
    "llm/layers/mlp/linear/w": "llm/layers/mlp/linear",
}


def big_vision_name(path: str) -> str:
    """big_vision's name, without "params/", of one of the model's paths."""
    for ours, theirs in _RENAMED.items():
        if path == ours or path.startswith(f"{ours}/"):
            return theirs + path.removeprefix(ours)
    return path


class BigVisionReader(CheckpointReader):
    """An npz file as big_vision publishes it, whole or in parts.

    The configuration follows from the shapes, except what shapes cannot tell: the 27B's query scale
    is recognized by its width, Gemma 2 by its second norms (attention soft-cap 50). A given
    `config` replaces the inferred one and must match the shapes.
    """

    kind = "big_vision"

    def __init__(self, path: Path, parts: list[Path], config: PaliGemmaConfig | None = None):
        self.path = path
        self.origin = {"kind": self.kind}
        self._file = NpzFile(path, parts)
        self._streams: dict[str, tuple[NpzStream, int]] = {}  # and the chunk that comes next
        try:
            self._names, self.config = self._match(config)
        except CheckpointError:
            self.close()
            raise
        self.specs = {}
        for ours, name in self._names.items():
            array = self._file.arrays[name]
            # 64-bit arrays come from numpy initializers; JAX itself would read them as 32-bit.
            dtype = FLOATS["float32"] if array.dtype == np.float64 else array.dtype
            self.specs[ours] = TensorSpec(array.shape, dtype)

    def _match(self, config: PaliGemmaConfig | None) -> tuple[dict[str, str], PaliGemmaConfig]:
        arrays = self._file.arrays
        prefix = next(
            (p for p in _PREFIXES if any(n.startswith((f"{p}img/", f"{p}llm/")) for n in arrays)),
            None,
        )
        if prefix is None:
            some = ", ".join(list(arrays)[:3]) or "nothing"
            raise CheckpointError(
                f"{self.path} is not a PaliGemma checkpoint: expected img/... and llm/... arrays, "
                f"as big_vision writes them, got {some}. See the published ones: paligemma models"
            )
        found = {name.removeprefix(prefix): array.shape for name, array in arrays.items()}
        config = config or with_text_length(infer_config(found, self.path), self.path)
        names = {name: big_vision_name(name) for name in expected_shapes(config)}
        problems = shape_problems(
            found, {names[name]: shape for name, shape in expected_shapes(config).items()}
        )
        problems += [
            f"dtype       {name}: {array.dtype}, model {', '.join(FLOATS)}"
            for name, array in arrays.items()
            if not problems and array.dtype not in FLOATS.values()
        ]
        if problems:
            raise validation_error(self.path, problems)
        return {ours: prefix + name for ours, name in names.items()}, config

    def processor_settings(self) -> dict[str, Any]:
        return big_vision_processor(self.config)

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        shapes = chunk_shapes(name, self.specs[name].shape)
        stream, ready = self._streams.pop(name, (None, 0))
        if stream is None or ready > index:
            if stream is not None:
                stream.close()
            stream, ready = self._file.stream(self._names[name]), 0
        for skipped in shapes[ready:index]:
            stream.read_into(aligned_empty(skipped, self._file.arrays[self._names[name]].dtype))
        stream.read_into(out)
        if index + 1 == len(shapes):
            stream.close()
        else:
            self._streams[name] = (stream, index + 1)

    def close(self) -> None:
        for stream, _ in self._streams.values():
            stream.close()
        self._file.close()


def infer_config(found: Mapping[str, Shape], path: Path) -> PaliGemmaConfig:
    """The configuration whose arrays `found` are; CheckpointError if there is none.

    `found` has big_vision's names without prefix. `text_length` is the default.
    """
    post_norms = any("post_attention_norm" in name or "post_ffw_norm" in name for name in found)
    ranks = {big_vision_name(n): s for n, s in expected_shapes(_example(post_norms)).items()}
    # Names and ranks first, so that the sizes below can be read without looking back.
    named = {name: found.get(name, shape) for name, shape in ranks.items()}
    problems = shape_problems(dict.fromkeys(found), dict.fromkeys(ranks))
    problems += [
        f"shape       {name}: checkpoint {shape}, model {len(ranks[name])} dimensions"
        for name, shape in named.items()
        if len(shape) != len(ranks[name])
    ]
    if problems:
        raise validation_error(path, problems)
    try:
        return _read_sizes({name: found[big_vision_name(name)] for name in _SIZED}, post_norms)
    except ConfigError as e:
        raise validation_error(path, [str(e)]) from e


_SIZED = (
    "img/patch_embed/kernel",
    "img/pos_embed",
    "img/blocks/attn/q/kernel",
    "img/blocks/mlp/fc1/kernel",
    "llm/embedder/input_embedding",
    "llm/layers/attn/q_einsum/w",
    "llm/layers/attn/kv_einsum/w",
    "llm/layers/mlp/gating_einsum/w",
)


def _example(post_norms: bool) -> PaliGemmaConfig:
    """Some configuration of the family; only its names and ranks matter."""
    return PaliGemmaConfig(
        img=SigLIPConfig(image_size=1, patch_size=1, width=1, depth=1, mlp_dim=1, num_heads=1),
        llm=dataclasses.replace(GEMMA2_27B, post_norms=post_norms),
    )


def _read_sizes(shapes: Mapping[str, Shape], post_norms: bool) -> PaliGemmaConfig:
    patch_size = shapes["img/patch_embed/kernel"][0]
    patches = shapes["img/pos_embed"][1]
    grid = math.isqrt(patches)
    if grid**2 != patches:
        raise ConfigError(f"{patches} position embeddings are not a square grid")
    img_depth, img_width, img_heads, _ = shapes["img/blocks/attn/q/kernel"]
    depth, heads, width, head_dim = shapes["llm/layers/attn/q_einsum/w"]
    is_27b = width == GEMMA2_27B.width and post_norms
    return PaliGemmaConfig(
        img=SigLIPConfig(
            image_size=grid * patch_size,
            patch_size=patch_size,
            width=img_width,
            depth=img_depth,
            mlp_dim=shapes["img/blocks/mlp/fc1/kernel"][-1],
            num_heads=img_heads,
        ),
        llm=GemmaConfig(
            width=width,
            depth=depth,
            mlp_dim=shapes["llm/layers/mlp/gating_einsum/w"][-1],
            num_heads=heads,
            num_kv_heads=shapes["llm/layers/attn/kv_einsum/w"][2],
            head_dim=head_dim,
            query_scale=((width / heads) if is_27b else head_dim) ** -0.5,
            vocab_size=shapes["llm/embedder/input_embedding"][0],
            post_norms=post_norms,
            attn_logit_softcap=50.0 if post_norms else 0.0,
        ),
    )


SUFFIX = ".npz"
FILE = f"model{SUFFIX}"


@dataclasses.dataclass(frozen=True)
class BigVision(CheckpointFormat):
    """big_vision's npz: the file alone where the target's name ends in .npz.

    Otherwise a directory of the file, the tokenizer and, where there is one, the mask codec. The
    file cannot tell the decoder's query scale and soft-caps: its readers know them.
    """

    name: ClassVar[str] = "big_vision"

    def is_file(self, target: Path) -> bool:
        return target.suffix == SUFFIX

    def check(self, target: Path, source: TensorSource) -> None:
        if not source.config.llm.tie_embeddings:
            raise CheckpointError(
                f"{target} cannot be written: these weights have an output head of their own "
                "(llm/lm_head/w), which big_vision's models do not. Use another format: paligemma "
                "convert SOURCE TARGET --to huggingface (or orbax)"
            )

    def write(self, target: Path, source: TensorSource, metadata: CheckpointMetadata) -> None:
        if target.is_dir():
            (target / BIG_VISION_TOKENIZER).write_bytes(metadata.tokenizer or b"")
            if metadata.mask_codec is not None:
                (target / MASK_CODEC).write_bytes(metadata.mask_codec)
            target = target / FILE
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for name, spec in source.specs.items():
                descr = "|V2" if spec.dtype == BFLOAT16 else spec.dtype.str
                header = {"descr": descr, "fortran_order": False, "shape": spec.shape}
                # A ZipInfo, so that today's date is not in it.
                member = zipfile.ZipInfo(f"params/{big_vision_name(name)}.npy")
                with archive.open(member, "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for (array,) in read_chunks(source, [name]):
                        file.write(as_bytes(array))
                        del array
