"""Builds the demo model's SentencePiece vocabulary from the world's own prompts and answers."""

import io

import sentencepiece

from paligemma_jax.demo.language import LANGUAGES
from paligemma_jax.demo.scene import sample_scene
from paligemma_jax.demo.splits import TRAINING, split_rng
from paligemma_jax.demo.tasks import examples, same_answer
from paligemma_jax.processing.sentencepiece_proto import append_user_pieces
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES

TEXT_PIECES = 339  # without control, byte and newline pieces
_CONTROL, _BYTES, _NEWLINE = 4, 256, 1


def corpus(seed: int, scenes: int) -> list[str]:
    """Returns the text to learn pieces from: prompts and answers, capitals and digits apart.

    Written words stand in it letter by letter, so that no piece ever holds several capitals:
    the model has to read, not to guess words.
    """
    lines = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", *"abcdefghijklmnopqrstuvwxyz", "yes", "no"]
    lines += [same_answer(True).prompt, "segment red circle ; blue square"] * (scenes // 4)
    lines += [f"caption {language}" for language in LANGUAGES]
    for index in range(scenes):
        rng = split_rng(seed, TRAINING, index)
        for example in examples(sample_scene(rng), rng):
            lines.append(example.prompt)
            if example.task == "ocr":
                lines += example.answer
            elif example.task != "detect":
                lines.append(example.answer)
            else:  # without the location tokens, which are pieces of their own
                lines += [part.rpartition(">")[2] for part in example.answer.split(" ; ")]
    return [line for line in lines if line]


def build_tokenizer(seed: int = 0, scenes: int = 4000) -> bytes:
    """Trains the demo tokenizer with Gemma's settings and bakes in <loc0000> .. <seg127>.

    Returns:
      A serialized SentencePiece model; the same bytes for the same arguments.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(corpus(seed, scenes)),
        model_writer=model,
        model_type="bpe",
        vocab_size=_CONTROL + _BYTES + _NEWLINE + TEXT_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )
    return append_user_pieces(model.getvalue(), LOC_PIECES + SEG_PIECES)
