"""A SentencePiece model -> the tokenizer files of a Hugging Face directory.

The inverse of processing/tokenizer_json.py. transformers reads tokenizer.json; old versions without
the tokenizers package read tokenizer.model and added_tokens.json.
"""

from typing import Any

from paligemma_jax.errors import CheckpointError
from paligemma_jax.processing.tokenizer import PieceType, read_pieces

IMAGE = "<image>"  # the placeholder that their processor puts in front of the prompt
_MASK = "<mask>"
_SPACE = "\u2581"  # as SentencePiece writes it
_SPECIAL = (PieceType.CONTROL, PieceType.UNKNOWN)
_UNLIMITED = 1_000_000_000_000_000_019_884_624_838_656  # their way to say so

Piece = tuple[str, float, PieceType]


def tokenizer_files(model: bytes) -> dict[str, dict[str, Any]]:
    """The contents of the JSON files by name; raises CheckpointError for a model unlike Gemma's.

    The image placeholder gets the id behind the last piece.
    """
    pieces = read_pieces(model)
    _require_gemma(pieces)
    added = {
        id: _added(text, special=kind in _SPECIAL)
        for id, (text, _, kind) in enumerate(pieces)
        if kind in _SPECIAL or kind is PieceType.USER_DEFINED
    }
    added[len(pieces)] = _added(IMAGE, special=True)
    names = {"bos_token": 2, "eos_token": 1, "pad_token": 0, "unk_token": 3}
    tokens: dict[str, str | None] = {name: pieces[id][0] for name, id in names.items()}
    if all(text != _MASK for text, _, _ in pieces):
        tokens["mask_token"] = None  # or it would be added behind the placeholder
    return {
        "tokenizer.json": _tokenizer_json(pieces, added),
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": {str(id): token for id, token in added.items()},
            "additional_special_tokens": [IMAGE],
            **tokens,
            "clean_up_tokenization_spaces": False,
            "model_max_length": _UNLIMITED,
            "processor_class": "PaliGemmaProcessor",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizer",
            "use_default_system_prompt": False,
        },
        "special_tokens_map.json": {
            "additional_special_tokens": [_plain(IMAGE)],
            **{name: _plain(token) for name, token in tokens.items() if token is not None},
        },
        "added_tokens.json": {IMAGE: len(pieces)},
    }


def _require_gemma(pieces: list[Piece]) -> None:
    kinds = [kind for _, _, kind in pieces[:4]]
    if kinds != [*[PieceType.CONTROL] * 3, PieceType.UNKNOWN]:
        found = ", ".join(repr(text) for text, _, _ in pieces[:4])
        raise CheckpointError(
            f"The tokenizer begins with {found}, which are not pad, eos, bos and unknown. Pass one "
            "of Gemma or PaliGemma: paligemma convert SOURCE TARGET --tokenizer tokenizer.model"
        )


def _tokenizer_json(pieces: list[Piece], added: dict[int, dict[str, Any]]) -> dict[str, Any]:
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, **token} for id, token in added.items()],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence],
            "pair": [sequence, second],
            "special_tokens": {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[3][0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: id for id, (text, _, _) in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }


def _merges(pieces: list[Piece]) -> list[str]:
    """Every way to make a piece of two, in the order of SentencePiece: the highest score first."""
    ids = {text: id for id, (text, _, kind) in enumerate(pieces) if kind is PieceType.NORMAL}
    found = []
    for id in sorted(ids.values(), key=lambda id: (-pieces[id][1], id)):
        text = pieces[id][0]
        cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        halves = [(ids[a], ids[b]) for a, b in cuts if a in ids and b in ids]
        found += [f"{pieces[a][0]} {pieces[b][0]}" for a, b in sorted(halves)]
    return found


def _added(text: str, *, special: bool) -> dict[str, Any]:
    return {
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,  # their text has spaces as SentencePiece writes them
        "special": special,
    }


def _plain(text: str) -> dict[str, Any]:
    """An added token as special_tokens_map.json has it."""
    return {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }
