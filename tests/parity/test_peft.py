"""Live parity: adapters of PEFT here, and ours in PEFT, on the same weights and random inputs.

Needs torch, transformers and peft, which nothing else here needs: pytest -m parity
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.loading import load_model
from paligemma_jax.models.lora import LoRA, add_lora
from paligemma_jax.weights.peft import load_adapter, save_adapter
from tests.parity.test_transformers import PREFIX, SUFFIX, inputs, reference

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


GOLDEN = Path(__file__).parents[1] / "golden" / "huggingface"
LANGUAGE = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
ADAPTERS: dict[str, dict[str, Any]] = {
    "the usual list": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]},
    "everything linear": {"target_modules": "all-linear", "use_rslora": True},
    "ranks and alphas": {
        "target_modules": LANGUAGE,
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "gate_proj": 2},
        "alpha_pattern": {"k_proj": 3, ".*layers.0.mlp.up_proj": 11},
    },
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "the projector whole": {
        "target_modules": LANGUAGE,
        "modules_to_save": ["multi_modal_projector"],
    },
    "the head whole": {"target_modules": LANGUAGE, "modules_to_save": ["lm_head"]},
}
# Adapters of random numbers make logits of 30, and their rounding errors grow with them.
CLOSE: dict[str, Any] = dict(atol=1e-3, rtol=1e-5)
OURS = {
    "language model": LoRA(rank=3, alpha=6),
    "every layer": LoRA(rank=4, alpha=5, rslora=True, targets="(llm/layers|img/blocks)/.*"),
    "projector": LoRA(rank=2, targets="img/head|llm/.*"),
    "values": LoRA(rank=2, targets="llm/layers/attn/kv_einsum/v"),
}


@pytest.fixture(params=["pg1", "pg2"])
def directory(request, tmp_path):
    """A copy, since transformers may write beside the weights."""
    source, target = GOLDEN / request.param / "hub_old", tmp_path / "base"
    shutil.copytree(source, target)
    return target


def their_logits(model, ids, pixels, rows):
    types = torch.zeros_like(ids)
    types[:, -SUFFIX:] = 1
    mask = torch.ones_like(ids)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, token_type_ids=types, attention_mask=mask)
    return out.logits[:, -(PREFIX + SUFFIX) :, :rows].numpy()


@jax.jit
def run(model, images, tokens, mask_ar):
    return model(images, tokens, mask_ar)


def our_logits(model, images, tokens):
    mask_ar = np.zeros_like(tokens)
    mask_ar[:, PREFIX:] = 1
    return np.asarray(run(model, *map(jnp.asarray, (images, tokens, mask_ar))))


def randomize(module, names=("lora_A", "lora_B", "modules_to_save")):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if any(part in name for part in names):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * ("modules_to_save" in name) + 0.15 * noise


@pytest.mark.parametrize("name", ADAPTERS)
def test_theirs_here(directory, name, tmp_path):
    images, tokens, ids, pixels, rows = inputs(directory, PREFIX + SUFFIX)
    base = reference(directory)
    plain = their_logits(base, ids, pixels, rows)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **ADAPTERS[name])
    model = peft.get_peft_model(base, config).eval()
    randomize(model)
    expected = their_logits(model, ids, pixels, rows)
    assert np.abs(expected - plain).max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load_model(directory, dtype="float32"), tmp_path / "adapter")
    np.testing.assert_allclose(our_logits(ours, images, tokens), expected, **CLOSE)
    if name == "the projector whole":
        save_adapter(ours, tmp_path / "ours", whole=["img/head/kernel", "img/head/bias"])
        again = peft.PeftModel.from_pretrained(reference(directory), tmp_path / "ours").eval()
        found = their_logits(again, ids, pixels, rows)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def trained(model):
    rng = np.random.default_rng(1)
    graphdef, state = nnx.split(model)
    for path, leaf in nnx.to_flat_state(state):
        if path[-1] == "lora_b":
            leaf[...] = jnp.asarray(0.2 * rng.normal(size=leaf[...].shape), leaf[...].dtype)
    return nnx.merge(graphdef, state)


# PEFT 0.21 with transformers 5.23 does not know the old name of the projector.
@pytest.mark.parametrize(
    ("name", "old_names"),
    [(n, old) for n in OURS for old in (False, True)[: 1 + (n != "projector")]],
)
def test_ours_there(directory, name, old_names, tmp_path):
    """As PEFT loads adapters, as transformers does, and as Roboflow's server does: from base/."""
    images, tokens, ids, pixels, rows = inputs(directory, PREFIX + SUFFIX)
    model = trained(add_lora(load_model(directory, dtype="float32"), OURS[name], nnx.Rngs(0)))
    package = tmp_path / "package"
    save_adapter(model, package, base=str(directory), old_names=old_names)
    shutil.copytree(directory, package / "base")
    expected = our_logits(model, images, tokens)
    for_peft = peft.PeftModel.from_pretrained(reference(package / "base"), package)
    config = for_peft.peft_config["default"]
    assert (config.r, config.use_rslora) == (OURS[name].rank, OURS[name].rslora)
    for_transformers = reference(directory)
    for_transformers.load_adapter(package)
    for theirs in (for_peft.eval(), for_transformers.eval()):
        found = their_logits(theirs, ids, pixels, rows)
        np.testing.assert_allclose(found, expected, **CLOSE)
    merged = for_peft.merge_and_unload()
    found = their_logits(merged, ids, pixels, rows)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_there_and_back(directory, tmp_path):
    """Ranks and alphas that differ by module, written by us, mean the same to PEFT."""
    images, tokens, ids, pixels, rows = inputs(directory, PREFIX + SUFFIX)
    config = peft.LoraConfig(r=4, lora_alpha=8, **ADAPTERS["ranks and alphas"])
    model = peft.get_peft_model(reference(directory), config).eval()
    randomize(model)
    expected = their_logits(model, ids, pixels, rows)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(load_model(directory, dtype="float32"), tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(reference(directory), tmp_path / "ours").eval()
    np.testing.assert_allclose(their_logits(again, ids, pixels, rows), expected, atol=1e-5)
