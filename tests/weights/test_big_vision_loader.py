"""What we write, read by big_vision's rules: its loader in short, and its names and shapes in full.

Facts: google-research/big_vision, commit 0127fb6: utils.load_params, models/proj/paligemma.
"""

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from paligemma_jax.config import VARIANTS, GemmaConfig, SigLIPConfig
from paligemma_jax.models.inference_layout import unstack_layers
from paligemma_jax.models.paligemma import flatten, from_params, nest
from paligemma_jax.weights.big_vision import big_vision_name
from paligemma_jax.weights.convert import export_weights
from paligemma_jax.weights.formats import CheckpointMetadata
from paligemma_jax.weights.load import load_params
from paligemma_jax.weights.tensors import expected_shapes
from paligemma_jax.weights.views import model_weights

Tree = dict[str, Any]


def their_load(spec: str) -> Tree:
    """PATH or PATH:SUBTREE; without a slash in PATH theirs does not know a file."""
    match = re.fullmatch(r"(.*?/.*?)(?::([\w/]+))?", spec)
    assert match, spec
    path, subtree = match.groups()
    with np.load(path, allow_pickle=False) as file:
        tree: Tree = nest({name: their_dtype(file[name]) for name in file.files})
    if "params" in tree:
        tree = tree["params"]
    elif "opt" in tree:
        tree = tree["opt"]["target"]
    for name in subtree.split("/") if subtree else ():
        tree = tree[name]
    return tree


def their_dtype(array: np.ndarray) -> np.ndarray:
    """NumPy has no bfloat16 and stores it as two bytes of no type."""
    if array.dtype == np.dtype("V2"):
        return array.view(ml_dtypes.bfloat16)
    assert array.dtype.kind == "f", array.dtype
    return array


def their_model_load(path: str, model: dict[str, tuple[int, ...]]) -> Tree:
    """`{"img": "PATH:img", "llm": "PATH:llm"}`, merged into a model of these names and shapes."""
    loaded = {part: their_load(f"{path}:{part}") for part in ("img", "llm")}
    rows = len(loaded["llm"]["embedder"]["input_embedding"])
    assert model["llm/embedder/input_embedding"][0] >= rows  # more are drawn at random
    assert flatten(loaded).keys() == model.keys()  # dont_load is empty
    assert {name: array.shape for name, array in flatten(loaded).items()} == model
    return loaded


def their_shapes(img: SigLIPConfig, llm: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of their models: vit.Model(scan=True, head_zeroinit), gemma.Model(scan)."""
    d, f, n, p = img.width, img.mlp_dim, img.num_heads, img.patch_size
    depth, h, side = img.depth, img.width // img.num_heads, img.image_size // img.patch_size
    layer, head = "img/Transformer/encoderblock", "MultiHeadDotProductAttention_0"
    shapes = {
        "img/embedding/kernel": (p, p, 3, d),
        "img/embedding/bias": (d,),
        "img/pos_embedding": (1, side * side, d),
        "img/Transformer/encoder_norm/scale": (d,),
        "img/Transformer/encoder_norm/bias": (d,),
        "img/head/kernel": (d, llm.width),
        "img/head/bias": (llm.width,),
        f"{layer}/MlpBlock_0/Dense_0/kernel": (depth, d, f),
        f"{layer}/MlpBlock_0/Dense_0/bias": (depth, f),
        f"{layer}/MlpBlock_0/Dense_1/kernel": (depth, f, d),
        f"{layer}/MlpBlock_0/Dense_1/bias": (depth, d),
        f"{layer}/{head}/out/kernel": (depth, n, h, d),
        f"{layer}/{head}/out/bias": (depth, d),
    }
    for name in ("query", "key", "value"):
        shapes[f"{layer}/{head}/{name}/kernel"] = (depth, d, n, h)
        shapes[f"{layer}/{head}/{name}/bias"] = (depth, n, h)
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        shapes |= {f"{layer}/{norm}/{name}": (depth, d) for name in ("scale", "bias")}
    d, f, n, k, h = llm.width, llm.mlp_dim, llm.num_heads, llm.num_kv_heads, llm.head_dim
    shapes |= {
        "llm/embedder/input_embedding": (llm.vocab_size, d),
        "llm/final_norm/scale": (d,),
        "llm/layers/attn/q_einsum/w": (llm.depth, n, d, h),
        "llm/layers/attn/kv_einsum/w": (llm.depth, 2, k, d, h),
        "llm/layers/attn/attn_vec_einsum/w": (llm.depth, n, h, d),
        "llm/layers/mlp/gating_einsum": (llm.depth, 2, d, f),
        "llm/layers/mlp/linear": (llm.depth, f, d),
    }
    norms = ["pre_attention_norm", "pre_ffw_norm"]
    norms += ["post_attention_norm", "post_ffw_norm"] if llm.post_norms else []
    return shapes | {f"llm/layers/{norm}/scale": (llm.depth, d) for norm in norms}


@pytest.mark.parametrize("name", ["paligemma-3b-pt-224", "paligemma2-10b-pt-448"])
def test_names_and_shapes_at_full_size(name: str):
    config = VARIANTS[name]
    shapes = {big_vision_name(path): shape for path, shape in expected_shapes(config).items()}
    assert shapes == their_shapes(config.img, config.llm)
    assert len(shapes) == (34 if config.llm.post_norms else 32)
    assert shapes["img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"] == (27, 1152, 4304)
    assert shapes["llm/embedder/input_embedding"][0] == 257_152


@pytest.mark.parametrize("variant", ["pg1", "pg2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_as_it_answers_becomes_their_tree(
    variant: str, dtype: str, golden: Path, tmp_path: Path
):
    """Their weights, loaded, unrolled for inference, written, and read by their rules."""
    source = golden / f"big_vision/{variant}.params.npz"
    config, params = load_params(source, dtype="float32")
    model = unstack_layers(from_params(config, params, "float32"))
    contents = CheckpointMetadata({"image": {}, "encoding": "big_vision"}, None)
    target = tmp_path / "model.npz"
    export_weights(target, model_weights(model), contents, "big_vision", dtype=dtype)
    found = flatten(their_model_load(str(target), their_shapes(config.img, config.llm)))
    wanted = flatten(their_load(str(source)))
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, wanted[name].astype(np.float32).astype(dtype))
