"""Rounding by what weights are multiplied with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.gptq import (
    Texts,
    measure_inputs,
    moment_bytes,
    quantize_by_moments,
    weight_paths,
)
from paligemma_jax.models.inference_layout import unstack_layers
from paligemma_jax.models.paligemma import PaliGemma, flatten, to_params
from paligemma_jax.models.quantization import calibrate_in_place, calibration_rounds, quantize
from paligemma_jax.models.quantization_config import Int4, QuantizationConfig
from paligemma_jax.models.quantized_matrix import multiply_groups, quantize_int4, unpack_int4
from tests.tiny import prompts, random_model

rng = np.random.default_rng(0)
MATRIX = rng.normal(size=(16, 24)).astype(np.float32)
INPUTS = (rng.normal(size=(200, 8)) @ rng.normal(size=(8, 24))).astype(np.float32)


def _off(values: jax.Array, scale: jax.Array) -> float:
    found = multiply_groups(values.astype(jnp.float32), scale.astype(jnp.float32))
    return float(np.mean(np.square(INPUTS @ np.asarray(found - MATRIX).T)))


@pytest.mark.parametrize(("groups", "dtype"), [(1, jnp.float32), (3, jnp.bfloat16)])
def test_products_are_closer(groups: int, dtype: type):
    moments = jnp.asarray(INPUTS.T @ INPUTS)
    found = quantize_by_moments(jnp.asarray(MATRIX), moments, groups)
    plain = quantize_int4(jnp.asarray(MATRIX), groups, dtype)
    assert [x.shape for x in found] == [x.shape for x in plain]
    assert [x.dtype for x in found] == [x.dtype for x in plain]
    assert _off(*found) < 0.5 * _off(*plain)


def test_inputs_that_tell_nothing_change_nothing():
    plain = quantize_int4(jnp.asarray(MATRIX), 3, jnp.bfloat16)
    for moments in (jnp.zeros((24, 24)), 7 * jnp.eye(24)):
        found = quantize_by_moments(jnp.asarray(MATRIX), moments, 3)
        for a, b in zip(found, plain, strict=True):
            np.testing.assert_array_equal(a, b)


def _texts(padding: int) -> Texts:
    batch = prompts([5, 3], 6)
    wider = [np.pad(x, ((0, 0), (0, padding)), constant_values=v) for x, v in (
        (batch.tokens, 9), (batch.mask_ar, 1), (batch.mask_input, False)
    )]  # fmt: skip
    return Texts(jnp.asarray(batch.images), *map(jnp.asarray, wider))


def test_padding_does_not_count(tiny_model: PaliGemma):
    model = unstack_layers(tiny_model)
    found, wider = (measure_inputs(model, [_texts(n)]) for n in (0, 3))
    depth = tiny_model.config.llm.depth
    assert found.keys() == {path for n in range(depth) for path in weight_paths(n)}
    for path, moments in found.items():
        np.testing.assert_allclose(moments, moments.T, rtol=1e-5)
        np.testing.assert_allclose(wider[path], moments, rtol=1e-3, atol=1e-3)


def test_other_models_are_refused(tiny_model: PaliGemma):
    for model in (tiny_model, quantize(tiny_model, "int8")):
        with pytest.raises(ConfigError, match="unstack_layers"):
            measure_inputs(model, [])


def test_layers_are_calibrated_in_turn(tiny_model: PaliGemma):
    """Later ones by what comes out of those that are rounded already."""
    quantization = QuantizationConfig(attention=Int4(8), mlp=Int4(8))
    config, texts = tiny_model.config, [_texts(0)]
    size = moment_bytes(config.llm)
    assert calibration_rounds(config, 2 * size) == [range(0, 2), range(2, 3)]
    assert calibration_rounds(config, 1) == [range(n, n + 1) for n in range(3)]
    models = []
    for memory in (1, 99 * size):
        model = unstack_layers(random_model(config))
        calibrate_in_place(model, quantization, lambda: texts, memory=memory)
        models.append(flatten(to_params(model)))
    together = flatten(to_params(quantize(tiny_model, quantization, inputs=measure_inputs(
        unstack_layers(tiny_model), texts
    ))))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, models[1], together)
    same = {n: np.array_equal(models[0][n], models[1][n]) for n in models[0] if "values" in n}
    assert all(same[n] for n in same if n.startswith("llm/layers/0/") or "embedder" in n)
    assert not all(same[n] for n in same if n.startswith("llm/layers/1/"))


def test_what_is_not_calibrated(tiny_model: PaliGemma):
    with pytest.raises(ConfigError, match="--quantization int4"):
        calibrate_in_place(unstack_layers(tiny_model), "int8", list)


def test_a_model_is_rounded_by_them(tiny_model: PaliGemma):
    model = unstack_layers(tiny_model)
    inputs = measure_inputs(model, [_texts(0), _texts(0)])
    plain, found = quantize(model, Int4(8)), quantize(model, Int4(8), inputs=inputs)
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    path = "llm/layers/1/mlp/down"
    before = flatten(to_params(model))[f"{path}/w"]
    off = []
    for rounded in (plain, found):
        arrays = flatten(to_params(rounded))
        values = unpack_int4(arrays[f"{path}/matrix/values"], before.shape[1], 3)
        error = multiply_groups(values.astype(jnp.float32), arrays[f"{path}/matrix/scale"]) - before
        off.append(float(jnp.einsum("oi,ij,oj", error, inputs[path], error)))
    assert off[1] < 0.7 * off[0]
