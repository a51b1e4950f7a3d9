"""A SentencePiece model as tokenizer.json: what is in it, and that it comes back the same."""

import json
from pathlib import Path

import pytest

from paligemma_jax.errors import CheckpointError
from paligemma_jax.processing.tokenizer import PieceType, Tokenizer, bpe_model
from paligemma_jax.weights.hf_tokenizer import tokenizer_files

TEXTS = (
    "detect cat ; dog",
    "segment <loc0012><loc1023> the\t  red   car",
    "héllo 🦜 <seg003> \u2581x  \n  y",
    "a\n\nb   ",
    "<b>bold</b> <unused1> 12345",
)


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> Tokenizer:
    return Tokenizer.from_file(golden / "processing" / "tiny_paligemma.model")


def test_it_comes_back_the_same(tokenizer: Tokenizer):
    files = tokenizer_files(tokenizer.to_bytes())
    again = Tokenizer.from_bytes(json.dumps(files["tokenizer.json"]).encode())
    assert again.vocab_size == tokenizer.vocab_size
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    # And once more: nothing is lost that this side does not use.
    assert tokenizer_files(again.to_bytes())["tokenizer.json"] == files["tokenizer.json"]


def test_added_tokens(tokenizer: Tokenizer):
    files = tokenizer_files(tokenizer.to_bytes())
    added = {token["content"]: token for token in files["tokenizer.json"]["added_tokens"]}
    assert added["<image>"] == {
        "id": tokenizer.vocab_size,
        "content": "<image>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    assert added["<bos>"]["special"] and not added["<loc0000>"]["special"]
    decoder = files["tokenizer_config.json"]["added_tokens_decoder"]
    assert {token["content"] for token in decoder.values()} == added.keys()
    assert files["added_tokens.json"] == {"<image>": tokenizer.vocab_size}


def test_merges_are_in_order_of_scores():
    pieces = [(name, 0.0, PieceType.CONTROL) for name in ("<pad>", "<eos>", "<bos>")]
    pieces += [("<unk>", 0.0, PieceType.UNKNOWN)]
    scores = {"a": -9.0, "b": -8.0, "ab": -2.0, "bb": -1.0, "abb": -3.0}
    pieces += [(text, score, PieceType.NORMAL) for text, score in scores.items()]
    model = tokenizer_files(bpe_model(pieces))["tokenizer.json"]["model"]
    assert model["merges"] == ["b b", "a b", "a bb", "ab b"]
    assert model["vocab"]["abb"] == 8 and model["byte_fallback"]


def test_another_kind_of_tokenizer_is_refused():
    pieces = [("<unk>", 0.0, PieceType.UNKNOWN), ("<s>", 0.0, PieceType.CONTROL)] * 2
    with pytest.raises(CheckpointError, match="which are not pad, eos, bos and unknown"):
        tokenizer_files(bpe_model(pieces))
