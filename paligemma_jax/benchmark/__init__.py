"""How fast this library is beside baselines and beside the roofline of the machine.

Here is what can be chosen. Nothing heavier is imported, for the command line needs it for its help;
torch and transformers are imported by the processes of the baselines alone.
"""

import enum

SIZES = ("tiny", "cpu", "gpu")


class Implementation(enum.StrEnum):
    """What runs or trains a model."""

    OURS = "paligemma-jax"
    BIG_VISION_STYLE = "big-vision-style"  # this library's scanned model, one call per token
    HUGGING_FACE = "huggingface"  # transformers as it comes: eager, growing cache
    HUGGING_FACE_COMPILED = "huggingface-compiled"  # static cache and torch.compile


BASELINES = (Implementation.HUGGING_FACE, Implementation.HUGGING_FACE_COMPILED)


class Task(enum.StrEnum):
    """Inference, or training: of all weights, or of LoRA adapters on the language model."""

    INFERENCE = "inference"
    FULL = "full"
    LORA = "lora"


TRAINING = (Task.FULL, Task.LORA)


class Precision(enum.StrEnum):
    """What weights are stored in; the integer ones are names of quantization configs."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT8_DYNAMIC = "int8-dynamic"
    INT4 = "int4"

    @property
    def quantized(self) -> bool:
        """Whether weights are integers, which only this library is measured with."""
        return self not in (Precision.FLOAT32, Precision.BFLOAT16)

    @property
    def floats(self) -> "Precision":
        """The dtype of activations, cache and image encoder."""
        return Precision.BFLOAT16 if self.quantized else self
