"""Random-weight PaliGemma checkpoints in both published formats, written one tensor at a time.

The same seed gives the same weights in both. Used at full size by the marked tests, at tiny size by
tests/weights.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.benchmark.random_checkpoint import RandomTensors, write_weights
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES, PieceType, bpe_model
from paligemma_jax.weights.big_vision import big_vision_name
from paligemma_jax.weights.hf_config import hf_generation, hf_preprocessor, padded_rows
from paligemma_jax.weights.huggingface import EMBEDDING, part_shape
from paligemma_jax.weights.tensors import (
    FLOATS,
    aligned_empty,
    as_bytes,
    copy_into,
    expected_shapes,
)

_CHARACTERS = "\u2581" + "".join(map(chr, range(33, 127)))


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
        "vocab_size": padded_rows(llm.vocab_size),
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


def smallest_vocabulary() -> int:
    """Pieces that `make_tokenizer` needs."""
    return 4 + 256 + 1 + len(_CHARACTERS) + len(LOC_PIECES) + len(SEG_PIECES)


def make_tokenizer(vocab_size: int) -> bytes:
    """A SentencePiece model: bytes, ASCII, filler that no text reaches, `<loc>` and `<seg>`."""
    pieces = [("<pad>", 0.0, PieceType.CONTROL), ("<eos>", 0.0, PieceType.CONTROL)]
    pieces += [("<bos>", 0.0, PieceType.CONTROL), ("<unk>", 0.0, PieceType.UNKNOWN)]
    pieces += [(f"<0x{i:02X}>", 0.0, PieceType.BYTE) for i in range(256)]
    pieces += [("\n", 0.0, PieceType.USER_DEFINED)]
    pieces += [(c, -float(i), PieceType.NORMAL) for i, c in enumerate(_CHARACTERS)]
    extra = LOC_PIECES + SEG_PIECES
    filler = vocab_size - smallest_vocabulary()
    if filler < 0:
        raise ValueError(f"{vocab_size} pieces do not hold bytes, ASCII, <loc> and <seg>")
    # No piece spells a part of these, so no text is ever merged into them.
    pieces += [(f"\ue000{i:06}", -1e6 - i, PieceType.NORMAL) for i in range(filler)]
    pieces += [(piece, 0.0, PieceType.USER_DEFINED) for piece in extra]
    return bpe_model(pieces)


def write_hugging_face(
    directory: Path,
    config: PaliGemmaConfig,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """A directory as published: old key layout, shards with an index, sparse configs."""
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, config, seed=seed, dtype=dtype, shard_bytes=shard_bytes)
    configs = {
        "config": hub_config(config, dtype),
        "generation_config": hf_generation(config),
        "preprocessor_config": hf_preprocessor(config),
    }
    for name, values in configs.items():
        (directory / f"{name}.json").write_text(json.dumps(values, indent=2))


def write_big_vision(
    path: Path, config: PaliGemmaConfig, *, seed: int = 0, dtype: str = "bfloat16"
) -> None:
    """An npz as big_vision writes it: flat "params/..." keys, bfloat16 as 2-byte void."""
    tensors = RandomTensors(config, seed=seed, dtype=dtype)
    # In C order of ours: by layer, then by part.
    keys: dict[str, list[tuple[int, int, str]]] = {}
    for key, (tensor, layer, _) in tensors.entries.items():
        keys.setdefault(tensor.path, []).append((layer, tensor.part or 0, key))
    descr = "|V2" if dtype == "bfloat16" else np.dtype(dtype).str
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for ours, shape in expected_shapes(config).items():
            member = f"params/{big_vision_name(ours)}.npy"
            with archive.open(member, "w", force_zip64=True) as file:
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for _, _, key in sorted(keys[ours]):
                    file.write(as_bytes(_in_our_layout(tensors, key, shape, dtype)))


def _in_our_layout(
    tensors: RandomTensors, key: str, ours: tuple[int, ...], dtype: str
) -> np.ndarray:
    tensor, _, _ = tensors.entries[key]
    theirs = tensors.whole(key)
    if tensor.key == EMBEDDING:
        return theirs[: ours[0]]
    shape = part_shape(tensor, ours)
    array = aligned_empty(shape, FLOATS[dtype])
    copy_into(array, tensor.to_ours(theirs, shape))
    return array
