"""Random-weight PaliGemma checkpoints in the published formats, written one tensor at a time.

The same seed gives the same weights in both formats. Values are as plausible as an
initialisation's, so that activations stay finite through all layers. Used at full size by the
marked tests, at tiny size by tests/weights.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.processing.sentencepiece_proto import PieceType, bpe_model
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES
from paligemma_jax.weights.arrays import FLOATS, as_bytes
from paligemma_jax.weights.big_vision import big_vision_name
from paligemma_jax.weights.hf_names import EMBEDDING, HFTensor, hf_tensors, part_shape
from paligemma_jax.weights.tree import expected_shapes

FILLER_ROWS = 64  # Hugging Face pads its table to a multiple of 64, the image placeholder included
_ROWS = 8192  # of a table made at once
_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def leaf_blocks(
    path: str, shape: tuple[int, ...], seed: int, dtype: str
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Blocks of one parameter in C order, each with its leading indices: layer and part, or row."""
    stacked = "/blocks/" in path or "/layers/" in path
    depth = 1 if stacked else 0
    depth += path.endswith(("kv_einsum/w", "gating_einsum/w"))
    if depth:
        for index in np.ndindex(shape[:depth]):
            yield index, _values(path, (*index,), shape[depth:], seed, dtype)
        return
    for start in range(0, shape[0], _ROWS):
        rows = (min(_ROWS, shape[0] - start), *shape[1:])
        yield (start,), _values(path, (start,), rows, seed, dtype)


def _values(
    path: str, index: tuple[int, ...], shape: tuple[int, ...], seed: int, dtype: str
) -> np.ndarray:
    random = np.random.default_rng([seed, zlib.crc32(path.encode()), *index])
    values = random.standard_normal(shape, np.float32)
    values *= 0.02
    if path.startswith("img/") and path.endswith("scale"):
        values += 1  # LayerNorm; Gemma's RMSNorm is stored less one
    return values.astype(FLOATS[dtype])


def write_big_vision(
    path: Path, config: PaliGemmaConfig, *, seed: int = 0, dtype: str = "bfloat16"
) -> None:
    """An npz as big_vision writes it: flat "params/..." keys, bfloat16 as 2-byte void."""
    descr = "|V2" if dtype == "bfloat16" else np.dtype(dtype).str
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for ours, shape in expected_shapes(config).items():
            member = f"params/{big_vision_name(ours)}.npy"
            with archive.open(member, "w", force_zip64=True) as file:
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for _, block in leaf_blocks(ours, shape, seed, dtype):
                    file.write(as_bytes(block))


def write_hugging_face(
    directory: Path,
    config: PaliGemmaConfig,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = 5_000_000_000,
    rename: Callable[[str], str] | None = None,
) -> None:
    """A Hugging Face directory as published: old key layout, shards with an index, sparse configs.

    `rename` maps canonical keys to another layout. One shard makes a single model.safetensors.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rename = rename or hub_key
    sizes = _hf_entries(config)
    shards: list[list[str]] = [[]]
    filled = 0
    for key, (_, _, shape) in sizes.items():
        size = math.prod(shape) * FLOATS[dtype].itemsize
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    weight_map = {}
    total = 0
    for name, keys in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            shapes = {rename(key): sizes[key][2] for key in keys}
            total += write_safetensors_header(file, shapes, _SAFETENSORS[dtype])
            for key in keys:
                tensor, layer, shape = sizes[key]
                for block in _hf_blocks(config, tensor, layer, shape, seed, dtype):
                    file.write(as_bytes(block))
        weight_map |= {rename(key): name for key in keys}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(hub_config(config, dtype), indent=2))
    settings = json.dumps(hub_preprocessor(config), indent=2)
    (directory / "preprocessor_config.json").write_text(settings)


def write_safetensors_header(file: IO[bytes], shapes: dict[str, tuple[int, ...]], kind: str) -> int:
    """The header of tensors that follow in this order; returns their bytes in all."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    itemsize = 4 if kind == "F32" else 2
    for key, shape in shapes.items():
        end = offset + math.prod(shape) * itemsize
        header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return offset


def _hf_entries(
    config: PaliGemmaConfig,
) -> dict[str, tuple[HFTensor, int, tuple[int, ...]]]:
    """Canonical key -> its row of the table, its layer, and its shape, filler rows included."""
    ours = expected_shapes(config)
    entries = {}
    for tensor in hf_tensors(config):
        shape = tensor.shape(part_shape(tensor, ours[tensor.path]))
        if tensor.key == EMBEDDING:
            shape = (shape[0] + FILLER_ROWS, *shape[1:])
        for layer in range(ours[tensor.path][0] if tensor.layered else 1):
            entries[tensor.key.format(layer)] = (tensor, layer, shape)
    return entries


def _hf_blocks(
    config: PaliGemmaConfig,
    tensor: HFTensor,
    layer: int,
    shape: tuple[int, ...],
    seed: int,
    dtype: str,
) -> Iterator[np.ndarray]:
    ours = expected_shapes(config)[tensor.path]
    if tensor.key == EMBEDDING:
        for _, block in leaf_blocks(tensor.path, ours, seed, dtype):
            yield block
        yield _values("filler", (), (FILLER_ROWS, shape[1]), seed, dtype)
    elif tensor.layered:
        index = (layer,) if tensor.part is None else (layer, tensor.part)
        block = _values(tensor.path, index, part_shape(tensor, ours), seed, dtype)
        yield tensor.to_theirs(block)
    else:
        blocks = [block for _, block in leaf_blocks(tensor.path, ours, seed, dtype)]
        yield tensor.to_theirs(np.concatenate(blocks))


def hub_key(key: str) -> str:
    """Canonical key -> the layout of the published repositories."""
    key = key.replace("language_model.", "language_model.model.", 1)
    key = key.replace("lm_head.", "language_model.lm_head.", 1)
    return key.replace("vision_tower.", "vision_tower.vision_model.", 1)


def hub_config(config: PaliGemmaConfig, dtype: str) -> dict[str, Any]:
    """config.json with the fields that published files have, and without those they omit."""
    img, llm = config.img, config.llm
    tokens = {"num_image_tokens": img.num_patches, "torch_dtype": dtype}
    text: dict[str, Any] = {
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_dim,
        "model_type": "gemma",
        "num_hidden_layers": llm.depth,
        "num_key_value_heads": llm.num_kv_heads,
        "vocab_size": llm.vocab_size + FILLER_ROWS,
        **tokens,
    }
    if llm.head_dim != 256:
        text["head_dim"] = llm.head_dim
    if not llm.post_norms or llm.num_heads != 8:
        text["num_attention_heads"] = llm.num_heads
    if llm.post_norms:
        text |= {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            "attn_logit_softcapping": llm.attn_logit_softcap,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 107],
            "final_logit_softcapping": llm.final_logit_softcap or None,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": round(llm.query_scale**-2),
            "sliding_window": 4096,
        }
    vision: dict[str, Any] = {
        "hidden_size": img.width,
        "intermediate_size": img.mlp_dim,
        "model_type": "siglip_vision_model",
        "num_attention_heads": img.num_heads,
        "num_hidden_layers": img.depth,
        "patch_size": img.patch_size,
        "projection_dim": llm.width,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
        **tokens,
    }
    if img.image_size != 224:
        vision["image_size"] = img.image_size
    return {
        "_vocab_size": llm.vocab_size,
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "ignore_index": -100,
        "image_token_index": llm.vocab_size,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": llm.width,
        "text_config": text,
        "torch_dtype": dtype,
        "transformers_version": "4.47.0",
        "vision_config": vision,
        "hidden_size": 2048,  # stale in published files of PaliGemma 2
    }


def hub_preprocessor(config: PaliGemmaConfig) -> dict[str, Any]:
    """preprocessor_config.json as published."""
    size = config.img.image_size
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": config.img.num_patches,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": size, "width": size},
    }


def make_tokenizer(vocab_size: int) -> bytes:
    """A SentencePiece model: bytes, ASCII, filler that no text reaches, `<loc>` and `<seg>`."""
    characters = "\u2581" + "".join(map(chr, range(33, 127)))
    pieces = [("<pad>", 0.0, PieceType.CONTROL), ("<eos>", 0.0, PieceType.CONTROL)]
    pieces += [("<bos>", 0.0, PieceType.CONTROL), ("<unk>", 0.0, PieceType.UNKNOWN)]
    pieces += [(f"<0x{i:02X}>", 0.0, PieceType.BYTE) for i in range(256)]
    pieces += [("\n", 0.0, PieceType.USER_DEFINED)]
    pieces += [(c, -float(i), PieceType.NORMAL) for i, c in enumerate(characters)]
    extra = LOC_PIECES + SEG_PIECES
    filler = vocab_size - len(pieces) - len(extra)
    if filler < 0:
        raise ValueError(f"{vocab_size} pieces do not hold bytes, ASCII, <loc> and <seg>")
    # No piece spells a part of these, so no text is ever merged into them.
    pieces += [(f"\ue000{i:06}", -1e6 - i, PieceType.NORMAL) for i in range(filler)]
    pieces += [(piece, 0.0, PieceType.USER_DEFINED) for piece in extra]
    return bpe_model(pieces)
