"""Hugging Face's tokenizer.json -> SentencePiece model, where there is no tokenizer.model.

transformers 5 saves only tokenizer.json. Its BPE vocabulary and merges came from a SentencePiece
model, and the pieces, their ids and the order of merges are enough to build one that encodes alike.
"""

import json
import re
from typing import Any

from paligemma_jax.errors import CheckpointError
from paligemma_jax.processing.sentencepiece_proto import PieceType, bpe_model

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_TAB = "<0x09>"
_IMAGE = "<image>"  # a placeholder of Hugging Face's processor, no piece of PaliGemma's tokenizer


def model_from_tokenizer_json(data: bytes, name: str = "The tokenizer") -> bytes:
    """The SentencePiece model of a tokenizer.json of Gemma's kind; raises CheckpointError.

    The `<image>` placeholder is left out where it is the last piece, as in published checkpoints.
    """
    try:
        settings: dict[str, Any] = json.loads(data)
        model = settings["model"]
        if model["type"] != "BPE" or not model["byte_fallback"]:
            raise ValueError
        added = {token["id"]: token for token in settings["added_tokens"]}
        pieces = {id: piece for piece, id in model["vocab"].items()}
        pieces |= {id: token["content"] for id, token in added.items()}
        ranks = _merge_ranks(model["merges"])
        if pieces[max(pieces)] == _IMAGE:
            del pieces[max(pieces)]
        ordered = [pieces[id] for id in range(len(pieces))]
        if _TAB not in ordered and "\t" in ordered:
            # Hugging Face's converter renames the byte piece; SentencePiece wants all 256 of them.
            ordered[ordered.index("\t")] = _TAB
        kinds = [
            _kind(piece, added.get(id), model["unk_token"]) for id, piece in enumerate(ordered)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"{name} is JSON, but no tokenizer of Gemma's kind (BPE with byte fallback, ids "
            "without gaps). The tokenizer.json or tokenizer.model of a PaliGemma checkpoint fits. "
            "Copy it from the published checkpoint."
        ) from e
    lowest = len(ranks)
    return bpe_model(
        [
            (piece, -float(ranks.get(piece, lowest)) if kind is PieceType.NORMAL else 0.0, kind)
            for piece, kind in zip(ordered, kinds, strict=True)
        ]
    )


def _merge_ranks(merges: list[str | list[str]]) -> dict[str, int]:
    """Piece -> place of the first merge that makes it; SentencePiece merges by score instead."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return ranks


def _kind(piece: str, added: dict[str, Any] | None, unknown: str) -> PieceType:
    if piece == unknown:
        return PieceType.UNKNOWN
    if _BYTE.fullmatch(piece):
        return PieceType.BYTE
    if added is None:
        return PieceType.NORMAL
    return PieceType.CONTROL if added["special"] else PieceType.USER_DEFINED
