"""big_vision's npz checkpoints: names, and the configuration read off the shapes.

Names and shapes: google-research/big_vision, models/proj/paligemma (commit 0127fb6). They are the
model's own but for SigLIP's names and two weights of the MLP.

One array of an npz file, read from its beginning to its end.

Reading npz files one array at a time, without trusting what they claim.

Not `np.load`: it reads whole arrays into fresh memory, believes any claimed size, and takes the
last of two arrays with one name. Pickled arrays are refused, since unpickling runs code.

big_vision's npz, written array by array and layer by layer.

Names: google-research/big_vision, utils.py (commit 0127fb6): keys of the tree joined with "/",
below "params/"; bfloat16 is stored as 2-byte void, for numpy has no name for it.
"""

import contextlib
import dataclasses
import functools
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from paligemma_jax.config import GEMMA2_27B, GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.weights.companions import (
    BIG_VISION_TOKENIZER,
    MASK_CODEC,
    Contents,
    PartsFile,
    with_text_length,
)
from paligemma_jax.weights.tensors import (
    BFLOAT16,
    FLOATS,
    Fill,
    TensorSpec,
    TreeShape,
    Weights,
    aligned_empty,
    as_bytes,
    copy_into,
    expected_shapes,
    find_problems,
    misfit,
    piece_places,
    piece_shapes,
    require_fit,
)

_READ = 16 << 20  # bytes at once

Read = Callable[[int], bytes]


@runtime_checkable
class ArrayStream(Protocol):
    """Gives the entries of an array in C order, as many at a time as are asked for."""

    def fill(self, target: np.ndarray) -> None:
        """Copies the next `target.size` entries into an array of any strides, with a cast.

        Raises EOFError where the file ends early, and what reading it raises.
        """
        ...


class COrderStream:
    """Of an array that is stored in C order; nothing is held but what is being copied."""

    def __init__(self, read: Read, dtype: np.dtype):
        self._read = read
        self._dtype = dtype

    def fill(self, target: np.ndarray) -> None:
        if not target.flags.c_contiguous:
            part = np.empty(target.shape, self._dtype)
            read_into(self._read, as_bytes(part))
            copy_into(target, part)
        elif self._dtype == target.dtype:
            read_into(self._read, as_bytes(target))
        else:
            flat = target.reshape(-1)
            block = np.empty(_READ // self._dtype.itemsize, self._dtype)
            for start in range(0, flat.size, block.size):
                part = flat[start : start + block.size]
                read_into(self._read, as_bytes(block[: part.size]))
                copy_into(part, block[: part.size])


class FortranOrderStream:
    """Of an array that is stored in Fortran order: all of it is read at once."""

    def __init__(self, read: Read, shape: tuple[int, ...], dtype: np.dtype):
        stored = aligned_empty(shape[::-1], dtype)
        read_into(read, as_bytes(stored))
        self._array = stored.T
        self._next = 0

    def fill(self, target: np.ndarray) -> None:
        if target.ndim < self._array.ndim:
            copy_into(target, self._array[self._next])
            self._next += 1
        else:
            stop = self._next + len(target)
            copy_into(target, self._array[self._next : stop])
            self._next = stop


def read_into(read: Read, buffer: memoryview) -> None:
    """Fills a buffer block by block; EOFError where the data ends before."""
    for start in range(0, len(buffer), _READ):
        part = buffer[start : start + _READ]
        data = read(len(part))
        if len(data) < len(part):
            raise EOFError("data ends early")
        part[:] = data


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

    Opening reads headers only. Raises CheckpointError listing every array that is no plain array.
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
                f"{path} {problem}. A whole npz file as big_vision writes it fits. Download it "
                "again."
            ) from e
        self.arrays: dict[str, NpzArray] = {}
        problems = self._read_headers()
        if problems:
            self.close()
            raise CheckpointError(
                f"{path} cannot be read safely ({len(problems)} problems):\n  "
                + "\n  ".join(problems)
                + "\nAn npz file of plain float arrays, as big_vision writes it, fits. Nothing was "
                "unpickled. Download it again from where it was published."
            )

    def _read_headers(self) -> list[str]:
        members = self._zip.infolist()
        if len(members) > _MAX_ARRAYS:
            return [f"{len(members):,} arrays, which no PaliGemma has"]
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
            raise ValueError("no array")
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
        for fill in self.parts(name, 1):
            fill(result)
        return result

    def parts(self, name: str, count: int) -> Iterator[Fill]:
        """What fills arrays with an array's `count` parts in turn; see `Weights.pieces`.

        Raises CheckpointError, and so does what it gives.
        """
        array = self.arrays[name]
        with contextlib.ExitStack() as stack:
            with self._one_error(name):
                file = stack.enter_context(self._zip.open(array.member))
                file.read(array.header_size)
                if array.fortran_order:
                    stream = FortranOrderStream(file.read, array.shape, array.dtype)
                else:
                    stream = COrderStream(file.read, array.dtype)
            for _ in range(count):
                yield functools.partial(self._fill, name, stream)

    def _fill(self, name: str, stream: ArrayStream, target: np.ndarray) -> None:
        with self._one_error(name):
            stream.fill(target)

    @contextlib.contextmanager
    def _one_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as e:
            raise CheckpointError(
                f"{self.path} is damaged at {name}: {e}. A whole file fits. Download it again."
            ) from e

    def close(self) -> None:
        self._zip.close()
        self._raw.close()


def _sniff(raw: PartsFile, number_of_parts: int) -> str:
    """What a file that is no zip seems to be."""
    raw.seek(0)
    start = raw.read(4096) or b""
    if not start:
        return "is empty"
    if start.startswith(b"PK\x03\x04"):
        part = " or its last part is missing" if number_of_parts > 1 else ""
        return f"is truncated: {raw.size:,} bytes without the end of an npz file{part}"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the checkpoint itself (run: git lfs pull)"
    if start[:1] == b"\x80":
        return "is a Python pickle, which is refused because loading one runs its code"
    if start.startswith(b"\x93NUMPY"):
        return "is a single npy array, no npz file"
    try:
        start.decode()
    except UnicodeDecodeError:
        return "is no npz file"
    return f"is a text file, no npz file; it begins with {start[:40].decode(errors='replace')!r}"


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


class BigVisionSource:
    """An npz file as big_vision publishes it, whole or in parts; see `Source`.

    The configuration follows from the shapes, except what shapes cannot tell: the 27B's query scale
    is recognised by its width, Gemma 2 by its second norms (attention soft-cap 50). A given
    `config` replaces the inferred one and must fit the shapes.
    """

    kind = "big_vision"

    def __init__(self, path: Path, parts: list[Path], config: PaliGemmaConfig | None = None):
        self.path = path
        self._file = NpzFile(path, parts)
        try:
            self._names, self.config = self._match(config)
        except CheckpointError:
            self.close()
            raise
        self.specs: dict[str, TensorSpec] = {}
        for ours, name in self._names.items():
            array = self._file.arrays[name]
            # 64-bit arrays come from numpy initialisers; JAX itself would read them as 32-bit.
            wide = array.dtype == np.float64
            dtype = FLOATS["float32"] if wide else array.dtype
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
                f"{self.path} is no PaliGemma checkpoint: it holds {some}. An npz file with "
                "img/... and llm/... arrays, as big_vision writes it, fits. Get one from the "
                "published models."
            )
        found = {name.removeprefix(prefix): array.shape for name, array in arrays.items()}
        config = config or with_text_length(infer_config(found, self.path), self.path)
        expected = {big_vision_name(n): s for n, s in expected_shapes(config).items()}
        require_fit(self.path, found, expected)
        wrong = [
            f"dtype       {name}: {array.dtype}, model {', '.join(FLOATS)}"
            for name, array in arrays.items()
            if array.dtype not in FLOATS.values()
        ]
        if wrong:
            raise misfit(self.path, wrong)
        return {n: prefix + big_vision_name(n) for n in expected_shapes(config)}, config

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        count = len(piece_places(name, self.specs[name].shape))
        return self._file.parts(self._names[name], count)

    def close(self) -> None:
        self._file.close()


def infer_config(found: Mapping[str, TreeShape], path: Path) -> PaliGemmaConfig:
    """The configuration whose arrays `found` are; CheckpointError if there is none.

    `found` has big_vision's names without prefix. `text_length` is the default.
    """
    post_norms = any("post_attention_norm" in name or "post_ffw_norm" in name for name in found)
    ranks = {big_vision_name(n): s for n, s in expected_shapes(_example(post_norms)).items()}
    # Names and ranks first, so that the sizes below can be read without looking back.
    named = {name: found.get(name, shape) for name, shape in ranks.items()}
    problems = find_problems(dict.fromkeys(found), dict.fromkeys(ranks))
    problems += [
        f"shape       {name}: checkpoint {shape}, model {len(ranks[name])} dimensions"
        for name, shape in named.items()
        if len(shape) != len(ranks[name])
    ]
    if problems:
        raise misfit(path, problems)
    try:
        return _read_sizes({name: found[big_vision_name(name)] for name in _SIZED}, post_norms)
    except ConfigError as e:
        raise misfit(path, [str(e)]) from e


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


def _read_sizes(shapes: Mapping[str, TreeShape], post_norms: bool) -> PaliGemmaConfig:
    patch_size = shapes["img/patch_embed/kernel"][0]
    patches = shapes["img/pos_embed"][1]
    grid = math.isqrt(patches)
    if grid**2 != patches:
        raise ConfigError(f"{patches} position embeddings are no square")
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
class BigVision:
    """big_vision's npz: the file alone where the target's name ends in .npz.

    Otherwise a directory of the file, the tokenizer and, where there is one, the mask codec. The
    file cannot tell the decoder's query scale and soft-caps: its readers know them.
    """

    name: ClassVar[str] = "big_vision"
    few_bits: ClassVar[bool] = False

    def is_file(self, target: Path) -> bool:
        """Whether `target` is to be one file."""
        return target.suffix == SUFFIX

    def needs_tokenizer(self, target: Path) -> bool:
        """Whether a tokenizer goes along."""
        return not self.is_file(target)

    def check(self, target: Path, weights: Weights) -> None:
        """Raises CheckpointError for what cannot be written, before anything is."""
        if not weights.config.llm.tie_embeddings:
            raise CheckpointError(
                f"{target} cannot be written: these weights have an output head of their own "
                "(llm/lm_head/w), and big_vision's models answer with the table of tokens. "
                'format="orbax" and format="huggingface" fit. Choose one of them: '
                "paligemma convert SOURCE TARGET --to huggingface"
            )

    def write(self, target: Path, weights: Weights, contents: Contents) -> None:
        """Writes into an empty directory, or over an empty file."""
        if target.is_dir():
            (target / BIG_VISION_TOKENIZER).write_bytes(contents.tokenizer or b"")
            if contents.mask_codec is not None:
                (target / MASK_CODEC).write_bytes(contents.mask_codec)
            target = target / FILE
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for name in weights.specs:
                _write_array(archive, weights, name)


def _write_array(archive: zipfile.ZipFile, weights: Weights, name: str) -> None:
    spec = weights.specs[name]
    descr = "|V2" if spec.dtype == BFLOAT16 else spec.dtype.str
    header = {"descr": descr, "fortran_order": False, "shape": spec.shape}
    member = zipfile.ZipInfo(f"params/{big_vision_name(name)}.npy")  # with no date of today
    with archive.open(member, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        buffer = aligned_empty((0,), spec.dtype)
        shapes = piece_shapes(name, spec.shape)
        for shape, fill in zip(shapes, weights.pieces(name, spec.dtype), strict=True):
            if buffer.shape != shape:
                buffer = aligned_empty(shape, spec.dtype)
            fill(buffer)
            file.write(as_bytes(buffer))
