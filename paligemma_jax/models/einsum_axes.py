"""Which axes of the decoder's weights are inputs, and which weights are two of them joined.

What the einsum equations of `gemma_block` say, for those who make other weights from these: layers
of few bits, adapters of low rank.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Axes:
    """Axes of one layer's weight, without the one that layers are stacked on.

    Attributes:
      inputs: those that are summed over, in ascending order.
      parts: names of the weights that are joined on the first axis; none if it is one weight.
    """

    inputs: tuple[int, ...]
    parts: tuple[str, ...] = ()

    @property
    def lead(self) -> int:
        """How many axes come before those of a single weight."""
        return 1 if self.parts else 0

    def outputs(self, ndim: int) -> tuple[int, ...]:
        """The axes that are neither inputs nor that of the parts, of so many."""
        return tuple(axis for axis in range(self.lead, ndim) if axis not in self.inputs)


EINSUM_AXES = {
    "attn/q_einsum": Axes((1,)),  # [N, W, H]
    "attn/kv_einsum": Axes((2,), ("k", "v")),  # [2, K, W, H]
    "attn/attn_vec_einsum": Axes((0, 1)),  # [N, H, W]
    "mlp/gating_einsum": Axes((1,), ("gate", "up")),  # [2, W, F]
    "mlp/linear": Axes((0,)),  # [F, W]
}
