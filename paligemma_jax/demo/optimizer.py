"""Optimizer of the demo model: Muon on the matrices, Adam on tables, biases and norms."""

import dataclasses
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

# Axes of each stacked weight that are contracted and produced; the rest are batch axes.
_MATRICES: dict[str, MuonDimensionNumbers] = {
    "patch_embed/kernel": MuonDimensionNumbers((0, 1, 2), 3),
    "attn/q/kernel": MuonDimensionNumbers(1, (2, 3)),
    "attn/k/kernel": MuonDimensionNumbers(1, (2, 3)),
    "attn/v/kernel": MuonDimensionNumbers(1, (2, 3)),
    "attn/out/kernel": MuonDimensionNumbers((1, 2), 3),
    "fc1/kernel": MuonDimensionNumbers(1, 2),
    "fc2/kernel": MuonDimensionNumbers(1, 2),
    "img/head/kernel": MuonDimensionNumbers(0, 1),
    "q_einsum/w": MuonDimensionNumbers(2, (1, 3)),
    "kv_einsum/w": MuonDimensionNumbers(3, (2, 4)),
    "attn_vec_einsum/w": MuonDimensionNumbers((1, 2), 3),
    "gating_einsum/w": MuonDimensionNumbers(2, 3),
    "linear/w": MuonDimensionNumbers(1, 2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Peaks are learning rates; see configs/demo.py."""

    peak: float
    adam_peak: float
    weight_decay: float
    warmup_steps: int
    decay_share: float
    grad_clip_norm: float


def schedule(config: OptimizerConfig, peak: float, total_steps: int) -> optax.Schedule:
    """Linear warm-up, plateau, linear decay to zero over the last `decay_share` of the steps."""
    decay = max(1, round(config.decay_share * total_steps))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, config.warmup_steps),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay),
        ],
        [config.warmup_steps, max(config.warmup_steps, total_steps - decay)],
    )


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Muon with update size matched to Adam's (root mean square 0.2), clipped by global norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip_norm),
        muon(
            schedule(config, config.peak, total_steps),
            weight_decay=config.weight_decay,
            adam_b2=0.98,
            adam_learning_rate=schedule(config, config.adam_peak, total_steps),
            muon_weight_dimension_numbers=_dimensions,
            consistent_rms=0.2,
        ),
    )


def _dimensions(params: Any) -> Any:
    def find(path: Any, _: Any) -> MuonDimensionNumbers | None:
        name = "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
        return next((v for k, v in _MATRICES.items() if name.endswith(k)), None)

    return jax.tree_util.tree_map_with_path(find, params)
