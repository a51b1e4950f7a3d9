"""Three billion parameters on this machine: pytest -m fullsize (40 GB of disk, 20 GB of memory)."""

import pytest

from paligemma_jax.config import VARIANTS
from tests.fullsize import synthetic
from tests.fullsize.directions import convert_all

pytestmark = pytest.mark.fullsize


@pytest.mark.parametrize("name", ["paligemma-3b-pt-224", "paligemma2-3b-pt-224"])
def test_full_size(name, tmp_path):
    pytest.importorskip("transformers")
    from tests.fullsize.prove import prove, row

    found = prove(name, tmp_path)
    print(row(found))
    weights = found["weights_bytes"]
    for key, value in found.items():
        if key.startswith("load "):
            assert value["peak_bytes"] <= 1.25 * weights, key
    assert found["generation huggingface"]["text"] is not None
    logits = found["logits"]
    assert logits["max_difference"] <= 1e-3 * max(1.0, logits["scale"])
    assert logits["top1_agreement"] == 1.0


def test_no_direction_needs_the_model_in_memory(tmp_path):
    config, source = VARIANTS["paligemma2-3b-pt-224"], tmp_path / "hub"
    synthetic.write_hugging_face(source, config)
    tokenizer = synthetic.make_tokenizer(config.llm.vocab_size)
    (source / "tokenizer.model").write_bytes(tokenizer)
    for found in convert_all(source, tmp_path / "converted"):
        assert found["peak_bytes"] < 2_000_000_000, found
