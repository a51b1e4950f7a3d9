"""transformers' PaliGemma as a subject, run as its users run it.

Letters: B batch, H W pixels, T prompt tokens, P image tokens per image, V vocabulary.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from paligemma_jax.benchmark.measure import Sample, Stopwatch, peak_resident
from paligemma_jax.benchmark.subjects import Prompts
from paligemma_jax.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import torch

_Result = TypeVar("_Result")
_EAGER: dict[str, Any] = {"cache_implementation": "dynamic"}


class HuggingFace:
    """A PaliGemmaForConditionalGeneration as a `Subject`.

    Eagerly, `generate` grows a DynamicCache, and attention is what transformers chooses: PyTorch's
    fused one, but the plain one in the decoder of PaliGemma 2, which refuses the other. Compiled,
    it has a StaticCache and decodes through torch.compile, as its documentation says; so do the
    image encoder and the prefill here, which `generate` leaves eager.
    """

    def __init__(self, model: Any, *, compiled: bool):
        self._model = model
        self._compiled = compiled
        self._on_gpu = model.device.type == "cuda"
        self._options = _compiled_generation(self._on_gpu) if compiled else _EAGER
        self._encode = self._maybe_compiled(model.get_image_features)
        self._forward = self._maybe_compiled(model.forward)

    def encode_images(self, images: np.ndarray) -> Callable[[], object]:
        pixels = pixel_values(self._model, images)
        return self._complete(lambda: self._encode(pixels))

    def first_token(self, prompts: Prompts) -> Callable[[], np.ndarray]:
        inputs = model_inputs(self._model, prompts)

        def call() -> np.ndarray:
            logits = self._forward(**inputs, use_cache=True, logits_to_keep=1).logits
            return _to_numpy(logits[:, -1].argmax(-1))

        return self._complete(call)

    def generate(self, prompts: Prompts, new_tokens: int) -> Callable[[], np.ndarray]:
        inputs = model_inputs(self._model, prompts)
        return self._complete(lambda: self._generate(inputs, new_tokens))

    def decode(self, prompts: Prompts, new_tokens: int) -> Callable[[], Sample]:
        inputs = model_inputs(self._model, prompts)

        def call() -> Sample:
            started = _Started(self._on_gpu)
            options = {"stopping_criteria": [started]}
            self._complete(lambda: self._generate(inputs, new_tokens, **options))()
            assert started.watch is not None, "transformers calls it after every token"
            return started.watch.stop()

        if self._compiled:  # one program for each length of the cache
            call()
        return call

    def _generate(
        self, inputs: "dict[str, torch.Tensor]", new_tokens: int, **options: Any
    ) -> np.ndarray:
        sequences = self._model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            **options,
            **self._options,
        )
        return _to_numpy(sequences[:, inputs["input_ids"].shape[1] :])

    def logits(self, prompts: Prompts) -> np.ndarray:
        """As of `Subject`; always eager."""
        inputs = model_inputs(self._model, prompts)

        def call() -> np.ndarray:
            logits = self._model(**inputs, logits_to_keep=1).logits[:, -1]
            # From the image token on there are no tokens.
            return logits[:, : self._model.config.image_token_id].float().cpu().numpy()

        return self._complete(call)()

    def peak_bytes(self) -> int:
        return peak_bytes(self._model)

    def _maybe_compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self._compiled:
            return function
        import torch

        torch._dynamo.config.capture_scalar_outputs = True  # or the check of the image's tokens
        return torch.compile(function, **_compile_options(self._on_gpu))

    def _complete(self, call: Callable[[], _Result]) -> Callable[[], _Result]:
        """`call` without gradients, to the end of the device's work."""
        import torch

        def whole() -> _Result:
            with torch.no_grad():
                try:
                    result = call()
                except Exception as e:  # torch.compile raises whatever its backends do
                    if self._compiled:
                        raise _cannot_compile(e) from e
                    raise
            if self._on_gpu:
                torch.cuda.synchronize()
            return result

        return whole


class _Started:
    """A stopping criterion that stops nothing, and starts a watch after the first token."""

    def __init__(self, on_gpu: bool):
        self.watch: Stopwatch | None = None
        self._on_gpu = on_gpu

    def __call__(self, input_ids: "torch.Tensor", scores: object, **_: object) -> "torch.Tensor":
        import torch

        if self.watch is None:
            if self._on_gpu:
                torch.cuda.synchronize()
            self.watch = Stopwatch()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def load_huggingface(weights: Path, dtype: str, *, compiled: bool = False) -> HuggingFace:
    """Loads the Hugging Face directory `weights`; raises as `load_model` does.

    Compiled, every call raises ConfigError where a static cache does not work: with PaliGemma 2.
    """
    return HuggingFace(load_model(weights, dtype).eval(), compiled=compiled)


def load_model(weights: Path, dtype: str) -> Any:
    """The PaliGemmaForConditionalGeneration of a directory, on the GPU if torch sees one.

    Raises MissingExtraError without torch or transformers.
    """
    # Idle threads of one operation must not take the cores from another library's.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import torch
        import transformers
    except ImportError as e:
        raise MissingExtraError("Measuring Hugging Face's implementation", "parity") from e
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
    model: Any = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        weights, dtype=getattr(torch, dtype), local_files_only=True
    )
    return model.to("cuda") if torch.cuda.is_available() else model


def model_inputs(
    model: Any, prompts: Prompts, token_types: np.ndarray | None = None
) -> "dict[str, torch.Tensor]":
    """What PaliGemmaProcessor makes of images and tokens.

    Token types i32[B, T] are 0 in the prefix, which sees all of itself (all of it, if None), and 1
    in the suffix.
    """
    import torch

    config, device, (images, tokens) = model.config, model.device, prompts
    patches = config.text_config.num_image_tokens
    image_tokens = np.full((len(tokens), patches), config.image_token_id)
    ids = np.concatenate([image_tokens, tokens], axis=1).astype(np.int64)
    types = np.zeros_like(ids)
    if token_types is not None:
        types[:, patches:] = token_types
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.ones(ids.shape, dtype=torch.int64, device=device),
        "token_type_ids": torch.tensor(types, device=device),
        "pixel_values": pixel_values(model, images),
    }


def pixel_values(model: Any, images: np.ndarray) -> "torch.Tensor":
    """Images f32[B, H, W, 3] as the model takes them."""
    import torch

    pixels = torch.tensor(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    return pixels.to(model.device, model.dtype)


def peak_bytes(model: Any) -> int:
    """Peak memory: of the GPU that the model is on, else of the process."""
    import torch

    return torch.cuda.max_memory_allocated() if model.device.type == "cuda" else peak_resident()


def _cannot_compile(error: Exception) -> ConfigError:
    first = (str(error).splitlines() or [""])[0]
    return ConfigError(
        "transformers cannot run this model with a static cache and torch.compile "
        f"({type(error).__name__}: {first}). "
        "Measure its eager loop: paligemma bench --implementation huggingface"
    )


def _compile_options(on_gpu: bool) -> dict[str, Any]:
    """What transformers compiles `generate` with; there are no CUDA graphs without CUDA."""
    return {"mode": "reduce-overhead" if on_gpu else "default", "dynamic": False}


def _compiled_generation(on_gpu: bool) -> dict[str, Any]:
    import transformers

    compilation: Any = transformers.CompileConfig(**_compile_options(on_gpu))
    compilation._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compilation}


def _to_numpy(tokens: "torch.Tensor") -> np.ndarray:
    return tokens.cpu().numpy().astype(np.int32)
