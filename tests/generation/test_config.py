"""GenerationConfig: values, names that people type, and a checkpoint's generation_config.json."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.generation.config import from_hugging_face, resolve_config, to_hugging_face


def resolve(**settings: Any) -> pg.GenerationConfig:
    return resolve_config("generate", None, settings, also=("batch_size",))


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 10**9),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", None),
        ("max_new_tokens", True),
        ("max_new_tokens", []),
        ("max_new_tokens", [4, "5"]),
        ("min_new_tokens", -1),
        ("seed", 2**64),
        ("seed", -1),
        ("seed", 1.0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", [0.1, float("inf")]),
        ("temperature", "warm"),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 1.1),
        ("min_p", float("nan")),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 3),
        ("eos_token_id", -1),
        ("eos_token_id", [1, "a"]),
        ("sampler", 3),
        ("constraint", "yes"),
        ("token_statistics", 3),
        ("top_logprobs", 65),
        ("temperature", 10**400),
        ("constraint", [None, pg.forbid_tokens([3], 8)]),
    ],
)
def test_values_that_a_field_cannot_have(name: str, value: Any):
    with pytest.raises(ConfigError, match=f"^{name}: expected"):
        resolve(**{name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("length_penalty", float("nan")),
        ("length_penalty", None),
        ("length_penalty", -(10**400)),
        ("num_beams", 0),
        ("num_beams", 257),
        ("num_beams", 10**400),
        ("num_return_sequences", 1.5),
        ("num_return_sequences", 5),
        ("early_stopping", 1),
    ],
)
def test_values_that_a_search_cannot_have(name: str, value: Any):
    with pytest.raises(ConfigError, match=f"^{name}: expected"):
        resolve_config("beam_search", None, {name: value})


def test_numbers_that_python_does_not_print():
    with pytest.raises(ConfigError, match="thousands of digits"):
        resolve(top_k=10**5000)


def test_values_that_contradict_each_other():
    with pytest.raises(ConfigError, match="min_new_tokens: expected at most"):
        resolve(min_new_tokens=200)
    with pytest.raises(ConfigError, match="min_new_tokens: expected at most"):
        resolve(min_new_tokens=[1, 9], max_new_tokens=[2, 8])
    with pytest.raises(ConfigError, match="each of 3 prompts, got a list of 2"):
        resolve(temperature=[1, 2, 3], seed=[1, 2])
    with pytest.raises(ConfigError, match="a sampler or top_k"):
        resolve(sampler=pg.Temperature(), top_k=3)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("nucleus", "'top_p'"),
        ("beams", "'num_beams' is for beam_search"),
        ("num_beams", "beam_search"),
        ("max_length", "'max_new_tokens'"),
        ("max_tokens", "'max_new_tokens'"),
        ("do_sample", "temperature"),
        ("repetition_penalty", "not supported"),
        ("temprature", "'temperature'"),
        ("Top_K", "'top_k'"),
        ("batchsize", "'batch_size'"),
        ("alpha", "'length_penalty' is for best_of and beam_search"),
        ("logprobs", "top_logprobs"),
        ("quux", "It takes"),
    ],
)
def test_wrong_names_are_answered_with_the_one_that_was_meant(name: str, meant: str):
    with pytest.raises(ConfigError, match=f"'{name}'.*{meant}"):
        resolve(**{name: 1})


def test_defaults():
    assert not resolve().samples and resolve(temperature=0.7).samples
    assert resolve(top_p=0.9).values("temperature", 2) == [1.0, 1.0]
    assert resolve(top_p=0.9, temperature=0).values("temperature", 1) == [0]
    assert resolve(top_k=[None, 4]).values("temperature", 2) == [0.0, 1.0]
    assert resolve(stop="a").values("stop", 2) == [("a",)] * 2
    assert resolve(stop=["a", "b"]).values("stop", 2) == [("a", "b")] * 2
    assert resolve(stop=[["a"], ["b"]]).values("stop", 2) == [("a",), ("b",)]
    assert resolve(eos_token_id=[3, 4]).values("eos_token_id", 2) == [(3, 4)] * 2
    assert resolve(seed=np.int64(3), top_k=np.array([1, 2])).values("top_k", 2) == [1, 2]


def test_lists_of_lists_stay_one_a_prompt_when_batches_split_them():
    config = resolve(stop=[["ab"], None, "ab"], eos_token_id=[[1, 2], 107, ()])
    alone = [config.select([i], 3) for i in range(3)]
    assert [one.values("stop", 1) for one in alone] == [[("ab",)], [()], [("ab",)]]
    assert [one.values("eos_token_id", 1) for one in alone] == [[(1, 2)], [(107,)], [()]]


def test_numbers_of_numpy_become_those_of_python():
    config = pg.GenerationConfig()  # as arguments they do not pass the type checks of the tests
    object.__setattr__(config, "seed", np.int64(5))
    object.__setattr__(config, "temperature", np.array([0.5, 1.0]))
    config.__post_init__()
    assert type(config.seed) is int and config.select([0, 1], 2).seed == (5, 6)
    assert config.temperature == (0.5, 1.0)


def test_one_value_for_all_or_one_for_each_prompt():
    config = resolve(seed=2**64 - 1, temperature=[0.1, 0.2, 0.3])
    each = config.select(range(3), 3)
    assert each.seed == (2**64 - 1, 0, 1)
    some = config.select([2, 0], 3)
    assert some.temperature == (0.3, 0.1) and some.seed == (1, 2**64 - 1)
    assert each.select([1], 3).seed == (0,)
    with pytest.raises(ConfigError, match="each of 2 prompts"):
        config.select([0], 2)


def test_a_configuration_is_shared_by_all_methods():
    """What a method has no use for is ignored in a configuration, and rejected as a keyword."""
    config = pg.GenerationConfig(temperature=0.5, num_beams=3, max_new_tokens=9)
    assert resolve_config("beam_search", config, {"num_beams": 5}).num_beams == 5
    assert resolve_config("generate", config, {}) is config
    with pytest.raises(ConfigError, match="temperature.*is for generate"):
        resolve_config("beam_search", config, {"temperature": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore
    own = resolve_config("generate", config, {"sampler": pg.TopK(k=3)})
    assert own.temperature is None and resolve_config("generate", own, {"top_k": 4}).sampler is None


PUBLISHED = {
    "_from_model_config": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "transformers_version": "4.41.0.dev0",
}


def test_the_published_file_changes_nothing_and_warns_of_nothing():
    neutral = {"repetition_penalty": 1.0, "temperature": 0.7, "num_beams": 1, "max_length": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_hugging_face(PUBLISHED, "f") == pg.GenerationConfig()
        assert from_hugging_face(PUBLISHED | neutral, "f") == pg.GenerationConfig()


def test_what_a_file_says_is_honored():
    values = {"eos_token_id": [1, 107], "max_new_tokens": 20, "do_sample": True, "top_p": 0.9}
    found = from_hugging_face(values, "f")
    assert found.values("eos_token_id", 1) == [(1, 107)] and found.max_new_tokens == 20
    assert (found.temperature, found.top_k, found.top_p) == (1.0, 50, 0.9)


def test_what_is_not_supported_is_named_in_one_warning():
    values = {"repetition_penalty": 1.2, "suppress_tokens": [3], "num_beams": 4, "eos_token_id": 1}
    with pytest.warns(UserWarning, match="repetition_penalty.*suppress_tokens.*num_beams") as found:
        from_hugging_face(PUBLISHED | values | {"invented": 3}, "model")
    assert len(found) == 1 and "invented" in str(found[0].message)
    assert "eos_token_id" not in str(found[0].message)
    with pytest.raises(CheckpointError, match="generation_config.json of model: eos_token_id"):
        from_hugging_face({"eos_token_id": "end"}, "model")


def test_it_is_read_kept_and_written(tmp_path: Path):
    """From a Hugging Face directory, through a native checkpoint, and back."""
    demo = pg.from_pretrained("demo", dtype="float32")
    assert demo.generation_config == pg.GenerationConfig()
    demo.save(tmp_path / "hf", "huggingface")
    path = tmp_path / "hf" / "generation_config.json"
    values = json.loads(path.read_text()) | {"eos_token_id": [1, 7], "max_new_tokens": 9}
    path.write_text(json.dumps(values))
    pg.convert(tmp_path / "hf", tmp_path / "native")
    again = pg.from_pretrained(tmp_path / "native", dtype="float32")
    again.save(tmp_path / "saved", "huggingface")
    for name in ("hf", "native", "saved"):
        config = pg.from_pretrained(tmp_path / name, dtype="float32").generation_config
        assert config == pg.GenerationConfig(eos_token_id=[1, 7], max_new_tokens=9)
    config = dataclasses.replace(config, temperature=0.5, top_k=3)
    assert from_hugging_face(to_hugging_face(config), "f") == config
