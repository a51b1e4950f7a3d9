"""Beam search without early stopping is that of transformers: the same answers and scores.

Needs torch and transformers: pytest -m parity
"""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.beam_search import beam_search
from paligemma_jax.processing.processor import Batch
from tests.goldens import assert_close, hugging_face

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


GOLDEN = Path(__file__).parents[1] / "golden" / "huggingface"
ROWS, PREFIX, LIMIT = 6, 6, 6


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("name, eos", [("pg1", 53), ("pg2", 117)])  # pieces that these models say
def test_answers_and_scores(name: str, eos: int, beams: int, alpha: float, tmp_path: Path):
    directory = tmp_path / name  # a copy, since transformers may write beside the weights
    shutil.copytree(GOLDEN / name / "hub_old", directory)
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    golden = hugging_face(name)
    config, model = golden.config, golden.model()
    rng = np.random.default_rng(0)
    size = config.img.image_size
    images = rng.uniform(-1, 1, (ROWS, size, size, 3)).astype(np.float32)
    tokens = rng.integers(4, config.llm.vocab_size, (ROWS, PREFIX)).astype(np.int32)
    image_ids = np.full((ROWS, config.img.num_patches), theirs.config.image_token_id)
    ids = torch.tensor(np.concatenate([image_ids, tokens], axis=1), dtype=torch.long)
    rows = theirs.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        out = theirs.generate(
            input_ids=ids,
            pixel_values=torch.tensor(np.moveaxis(images, -1, 1)),
            token_type_ids=torch.zeros_like(ids),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LIMIT,
            do_sample=False,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=alpha,
            early_stopping="never",
            eos_token_id=eos,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            # The filler rows behind the vocabulary are no tokens: we drop them when loading.
            suppress_tokens=list(range(config.llm.vocab_size, rows)),
            renormalize_logits=True,
        )
    batch = Batch(
        images=images[:, None],
        tokens=tokens,
        mask_ar=np.zeros_like(tokens),
        mask_input=jnp.ones(tokens.shape, bool),
    )
    ours = beam_search(
        model,
        batch,
        num_beams=beams,
        max_new_tokens=LIMIT,
        length_penalty=alpha,
        num_return_sequences=beams,
        early_stopping=False,
        eos_token_id=eos,
    )
    expected = out.sequences[:, ids.shape[1] :].numpy().reshape(ROWS, beams, -1)
    ends = 0
    for mine, wanted in zip(ours, expected.tolist(), strict=True):
        for answer, tokens in zip(mine, wanted, strict=True):
            assert list(answer.tokens) == tokens[: len(answer.tokens)]
            assert answer.tokens[-1] == eos or len(answer.tokens) == LIMIT
            ends += answer.tokens[-1] == eos
    assert 0 < ends < ROWS * beams
    scores = [[answer.score for answer in row] for row in ours]
    assert_close(scores, out.sequences_scores.numpy().reshape(ROWS, beams))
