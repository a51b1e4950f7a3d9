"""Adapters of low rank: nothing at first, one product with the weights at last."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.generate import generate
from paligemma_jax.models.inference_layout import stack_layers, stacked_params, unstack_layers
from paligemma_jax.models.linear import Dense, DropoutKey, Einsum, EinsumAxes
from paligemma_jax.models.lora import (
    LoRA,
    adapters,
    add_lora,
    merge_lora,
    with_dropout,
)
from paligemma_jax.models.paligemma import PaliGemma, flatten, to_params
from tests.tiny import GEMMA, prompts, random_images, random_model, random_tokens, tiny_config

EVERYTHING = "(llm/layers|img)/.*"
EINSUM_AXES = {
    "attn/q_einsum": EinsumAxes((1,)),
    "attn/kv_einsum": EinsumAxes((2,), ("k", "v")),
    "attn/attn_vec_einsum": EinsumAxes((0, 1)),
    "mlp/gating_einsum": EinsumAxes((1,), ("gate", "up")),
    "mlp/linear": EinsumAxes((0,)),
}
EQUATIONS = {
    "attn/q_einsum": ("BTW,NWH->BTNH", (2, 5, 6), (3, 6, 4)),
    "attn/kv_einsum": ("BTW,CKWH->CBTKH", (2, 5, 6), (2, 3, 6, 4)),
    "attn/attn_vec_einsum": ("BTNH,NHW->BTW", (2, 5, 3, 4), (3, 4, 6)),
    "mlp/gating_einsum": ("BTW,CWF->BTCF", (2, 5, 6), (2, 6, 7)),
    "mlp/linear": ("BTF,FW->BTW", (2, 5, 7), (7, 6)),
}


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    mask_ar = jnp.array([[0, 0, 0, 1, 1]] * 2)
    return jnp.asarray(random_images(2)), jnp.asarray(random_tokens(2, 5)), mask_ar


@jax.jit
def run(model: PaliGemma) -> jax.Array:
    return model(*inputs())


def trained(model: PaliGemma) -> PaliGemma:
    """The model with adapters that do something."""
    rng = np.random.default_rng(1)
    graphdef, state = nnx.split(model)
    for path, leaf in nnx.to_flat_state(state):
        if path[-1] == "lora_b":
            leaf[...] = jnp.asarray(0.2 * rng.normal(size=leaf[...].shape), leaf[...].dtype)
    return nnx.merge(graphdef, state)


def einsum_layer(weight: np.ndarray, axes: EinsumAxes, dtype: Any = jnp.float32) -> Einsum:
    kw: dict[str, Any] = dict(dtype=dtype, param_dtype=jnp.float32)
    layer = nnx.eval_shape(lambda: Einsum(weight.shape, axes, rngs=nnx.Rngs(0), **kw))
    layer.w = nnx.Param(jnp.asarray(weight, jnp.float32))
    return layer


@pytest.fixture(scope="module")
def new(tiny_model: PaliGemma) -> PaliGemma:
    lora = LoRA(rank=2, alpha=3, dropout=0.5, targets=EVERYTHING)
    return add_lora(tiny_model, lora, nnx.Rngs(0))


@pytest.fixture(scope="module")
def adapted(new: PaliGemma) -> PaliGemma:
    return trained(new)


def test_new_adapters_change_nothing(tiny_model: PaliGemma, new: PaliGemma):
    before = flatten(to_params(tiny_model))
    # Two programs: XLA fuses other operations, which may round differently.
    np.testing.assert_allclose(run(new), run(tiny_model), atol=1e-5)
    params = flatten(to_params(new))
    assert all(params[path] is array for path, array in before.items())
    assert before.keys() == flatten(to_params(tiny_model)).keys()
    names = {path.rpartition("/")[2] for path in params.keys() - before.keys()}
    assert names == {"lora_a", "lora_b", "lora_scale"}
    assert all(params[path].dtype == jnp.float32 for path in params.keys() - before.keys())


@pytest.mark.slow
def test_new_adapters_change_no_bit():
    """Operation by operation, where nothing is fused."""
    model = random_model(tiny_config(GEMMA, depth=1))
    new = add_lora(model, LoRA(rank=2, targets=EVERYTHING), nnx.Rngs(0))
    with jax.disable_jit():
        np.testing.assert_array_equal(new(*inputs()), model(*inputs()))


def test_each_part_is_its_weight_and_its_own_product():
    """By the definition, part by part: w + scale a b, in NumPy. Nothing changes where b is zero."""
    rng, rank = np.random.default_rng(0), 2
    layers, plain, expected, xs = {}, {}, {}, {}
    for name, (equation, of_x, of_w) in EQUATIONS.items():
        axes = EINSUM_AXES[name]
        x, w = rng.normal(size=of_x), rng.normal(size=of_w)
        lead = of_w[: axes.lead]
        ins = [of_w[axis] for axis in axes.inputs]
        outs = [of_w[axis] for axis in axes.outputs(len(of_w))]
        a, b = rng.normal(size=(*lead, *ins, rank)), rng.normal(size=(*lead, rank, *outs))
        scale = rng.normal(size=lead)
        whole = w.copy()
        for part in np.ndindex(*lead):
            matrix = a[part].reshape(-1, rank) @ b[part].reshape(rank, -1) * scale[part]
            places = [axis - axes.lead for axis in axes.inputs]
            whole[part] += np.moveaxis(matrix.reshape(*ins, *outs), range(len(ins)), places)
        expected[name] = np.einsum(equation, x, whole)
        a, b, scale, xs[name] = (np.asarray(y, np.float32) for y in (a, b, scale, x))
        for kind, own, dtype in (
            ("trained", b, jnp.float32),
            ("new", 0 * b, jnp.float32),
            ("new, rounded", 0 * b, jnp.bfloat16),
        ):
            base = plain[name, kind] = einsum_layer(w, axes, dtype)
            arrays = map(jnp.asarray, (a, own, scale))
            layers[name, kind] = base.with_adapter(LoRA(rank=rank), *arrays)

    @jax.jit
    def run(layers: Any, xs: Any) -> Any:
        return {key: layer(EQUATIONS[key[0]][0], xs[key[0]]) for key, layer in layers.items()}

    found, without = run(layers, xs), run(plain, xs)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name, "trained"], array, atol=1e-5)
        for kind in ("new", "new, rounded"):
            np.testing.assert_array_equal(found[name, kind], without[name, kind])


def test_the_image_encoders_layers():
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(3, 4, 6)), rng.normal(size=(2, 5, 3, 4))
    a, b = rng.normal(size=(3, 4, 2)), rng.normal(size=(2, 6))
    kw: dict[str, Any] = dict(rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    base = Dense((3, 4), (6,), **kw)
    base.kernel[...] = jnp.asarray(kernel, jnp.float32)
    base.bias[...] = jnp.arange(6.0)
    arrays = (jnp.asarray(array, jnp.float32) for array in (a, b, 0.5))
    layer = base.with_adapter(LoRA(rank=2), *arrays)
    expected = np.einsum("btnh,nhw->btw", x, kernel + 0.5 * np.einsum("nhr,rw->nhw", a, b))
    expected += np.arange(6)
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)


def test_merged_is_unmerged(adapted: PaliGemma, tiny_model: PaliGemma):
    merged = merge_lora(adapted)
    assert flatten(to_params(merged)).keys() == flatten(to_params(tiny_model)).keys()
    logits = np.asarray(run(adapted))
    assert np.abs(logits - run(tiny_model)).max() > 0.1
    np.testing.assert_allclose(run(merged), logits, atol=1e-4, rtol=1e-5)
    params = flatten(to_params(adapted))
    path = "llm/layers/attn/kv_einsum"
    a, b = (np.asarray(params[f"{path}/lora_{x}"], np.float64) for x in "ab")
    delta = 1.5 * np.einsum("lcwr,lcrkh->lckwh", a, b)
    expected = (np.asarray(params[f"{path}/w"], np.float64) + delta).astype(np.float32)
    found = np.asarray(merged.llm.layers.attn.kv_einsum.w[...])  # pyright: ignore
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-7)
    assert merge_lora(merged) is merged
    saved = {path: make() for path, make in stacked_params(adapted)}
    same = flatten(to_params(stack_layers(unstack_layers(adapted))))
    for path, array in flatten(to_params(merged)).items():
        np.testing.assert_array_equal(saved.pop(path), array)
        np.testing.assert_array_equal(same.pop(path), array)
    assert not saved and not same


@pytest.mark.slow
def test_answers_with_adapters_are_those_of_the_merged_model(adapted: PaliGemma):
    batch = prompts([5, 3], 6)
    options: dict[str, Any] = dict(max_new_tokens=4)
    one_by_one = unstack_layers(adapted)  # merges
    assert isinstance(one_by_one.llm.layers, nnx.List)
    for mine, theirs in zip(
        generate(adapted, batch, **options), generate(one_by_one, batch, **options), strict=True
    ):
        assert list(mine.tokens) == list(theirs.tokens)


def test_targets_may_be_parts_of_a_weight(tiny_model: PaliGemma):
    lora = LoRA(rank=2, alpha=5, targets="llm/layers/attn/(q_einsum|kv_einsum/v)")
    model = add_lora(tiny_model, lora, nnx.Rngs(0))
    found = adapters(model)
    assert found.keys() == {"llm/layers/attn/q_einsum", "llm/layers/attn/kv_einsum"}
    layer = found["llm/layers/attn/kv_einsum"]
    assert layer.lora_a is not None
    np.testing.assert_array_equal(layer.lora_scale[...], [[0, 2.5]] * 3)
    assert not np.any(layer.lora_a[...][:, 0]) and np.all(layer.lora_a[...][:, 1])
    assert np.abs(layer.lora_a[...]).max() <= tiny_model.config.llm.width**-0.5


def test_the_default_is_the_language_model(tiny_model: PaliGemma):
    found = adapters(add_lora(tiny_model, LoRA(), nnx.Rngs(0)))
    assert found.keys() == {f"llm/layers/{name}" for name in EINSUM_AXES}
    scales = {float(layer.lora_scale[...].max()) for layer in found.values()}
    assert scales == {1.0}
    assert LoRA(rank=16, alpha=8, rslora=True).scale == 2.0


def test_dropout_and_gradients(tiny_model: PaliGemma):
    """One step's worth: what is trained, what is not, and that keys decide."""
    lora = LoRA(rank=2, dropout=0.5, targets="llm/layers/(attn/kv_einsum/v|mlp/.*)")
    model = add_lora(tiny_model, lora, nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    @jax.jit
    def gradient(state: Any, key: jax.Array) -> Any:
        def loss(state: Any) -> jax.Array:
            dropping = with_dropout(nnx.merge(graphdef, state), key)
            return jnp.mean(jnp.square(dropping(*inputs())))

        return nnx.to_pure_dict(jax.grad(loss)(state))

    first, again, other = (flatten(gradient(state, jax.random.key(seed))) for seed in (0, 0, 1))
    kv = "llm/layers/attn/kv_einsum"
    for path, array in first.items():
        np.testing.assert_array_equal(array, again[path])
        if path.endswith("lora_b") and not path.startswith(kv):
            assert np.all(array) and not np.array_equal(array, other[path])
        if path.endswith(("lora_a", "lora_scale")):  # b is zero still, and scales are constants
            assert not np.any(array)
    assert not np.any(first[f"{kv}/lora_b"][:, 0]) and np.all(first[f"{kv}/lora_b"][:, 1])
    keys = [layer.dropout_key for layer in adapters(model).values()]
    assert keys == [None] * 3  # the model itself drops nothing


def test_dropout_keeps_the_mean():
    spec = LoRA(rank=1, dropout=0.25)
    kw: dict[str, Any] = dict(rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    base = Dense((1,), (1,), **kw)
    base.kernel[...] = jnp.zeros((1, 1))
    layer = base.with_adapter(spec, jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones(()))
    x = jnp.ones((10_000, 1))
    assert np.all(layer(x) == 1)
    layer.dropout_key = DropoutKey(jax.random.key(0))
    y = np.asarray(layer(x))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.03


def test_what_cannot_be(tiny_model: PaliGemma, adapted: PaliGemma):
    with pytest.raises(ConfigError, match="rank is 0.*dropout is 1.*no regular expression"):
        LoRA(rank=0, dropout=1, targets="(")
    rngs = nnx.Rngs(0)
    with pytest.raises(ConfigError, match="matches no layer.*img/head.*kv_einsum/k"):
        add_lora(tiny_model, LoRA(targets="q_proj"), rngs)
    with pytest.raises(ConfigError, match="adapters already.*merge_lora"):
        add_lora(adapted, LoRA(), rngs)
    with pytest.raises(ConfigError, match="one by one.*stack_layers"):
        add_lora(unstack_layers(tiny_model), LoRA(), rngs)
