"""What a measured process does with the model."""

import enum


class Task(enum.StrEnum):
    """Answer prompts, or train: all weights, or adapters on the language model's layers."""

    ANSWER = "answer"
    FULL = "full"
    LORA = "lora"


TRAINING = (Task.FULL, Task.LORA)
