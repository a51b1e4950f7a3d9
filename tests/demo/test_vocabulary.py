"""The demo tokenizer: Gemma's settings, every example survives the round trip."""

from pathlib import Path

import pytest
import sentencepiece

from checkpoints.training.data import build_tokenizer
from paligemma_jax.demo.scene import HELD_OUT, WORDS, sample_scene, split_rng
from paligemma_jax.demo.tasks import examples, same_answer

COMMITTED = Path(__file__).parents[2] / "checkpoints" / "demo" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(COMMITTED))


def test_layout(tokenizer: sentencepiece.SentencePieceProcessor):
    ids = (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.unk_id())
    assert ids == (0, 1, 2, 3)
    assert tokenizer.encode("\n") == [4]
    assert tokenizer.vocab_size() <= 1760
    first = tokenizer.piece_to_id("<loc0000>")
    names = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]
    assert [tokenizer.id_to_piece(first + i) for i in range(1152)] == names
    assert first + 1152 == tokenizer.vocab_size()
    assert tokenizer.encode("".join(names)) == list(range(first, first + 1152))


def test_every_example_survives(tokenizer: sentencepiece.SentencePieceProcessor):
    texts = {same_answer(True).prompt, "yes", "no", "segment red circle"}
    for index in range(600):
        rng = split_rng(2026, HELD_OUT, index)
        for example in examples(sample_scene(rng), rng):
            texts |= {example.prompt, example.answer}
    assert len(texts) > 2000
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not any(tokenizer.is_byte(i) or tokenizer.is_unknown(i) for i in ids)


def test_written_words_are_read_letter_by_letter(tokenizer: sentencepiece.SentencePieceProcessor):
    for word in (*WORDS, "0", "47", "999"):
        assert tokenizer.encode(word, out_type=str) == list(word)


@pytest.mark.parametrize("text", ["an owl 🦉", "naïve", "a  b", "<eos>", "tab\there", "Ж"])
def test_other_text_falls_back_to_bytes(tokenizer: sentencepiece.SentencePieceProcessor, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not any(tokenizer.is_unknown(i) or tokenizer.is_control(i) for i in ids)


def test_frequent_words_are_whole(tokenizer: sentencepiece.SentencePieceProcessor):
    for word in ("circle", "square", "triangle", "star", "cross", "red", "blue", "there", "Kreis"):
        assert tokenizer.encode(f" {word}", out_type=str) == [f"▁{word}"]


def test_building_is_reproducible():
    model = build_tokenizer(1, scenes=400)
    assert model == build_tokenizer(1, scenes=400)
    assert sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size() == 1752
