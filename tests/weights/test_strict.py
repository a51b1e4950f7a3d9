import pytest

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.tensors import find_problems, require_fit


def test_one_error_names_every_problem():
    found = {"zzz/w": (3,), "kv_einsum/w": (3, 2, 1, 32, 4), "fine": (1,)}
    expected = {"q_einsum/w": (3, 4, 32, 8), "kv_einsum/w": (3, 2, 1, 32, 8), "fine": (1,)}
    with pytest.raises(CheckpointError) as error:
        require_fit("dir/model.npz", found, expected)
    assert str(error.value).splitlines()[:4] == [
        "Checkpoint dir/model.npz does not fit the model (3 problems):",
        "  missing     q_einsum/w (3, 4, 32, 8)",
        "  unexpected  zzz/w (3,)",
        "  shape       kv_einsum/w: checkpoint (3, 2, 1, 32, 4), model (3, 2, 1, 32, 8)",
    ]


def test_a_renamed_tensor_is_pointed_to():
    (missing, unexpected) = find_problems(
        {"llm/layers/mlp/lineer": (2,)}, {"llm/layers/mlp/linear": (2,)}
    )
    assert missing.endswith("(is it llm/layers/mlp/lineer?)")
    assert unexpected.startswith("unexpected")


def test_equal_shapes_fit():
    require_fit("x", {"a": (1, 2)}, {"a": (1, 2)})
