"""transformers' PaliGemma as an implementation to measure, run as its users run it.

Letters: B rows, H W pixels, T prompt tokens, P image tokens a picture, V vocabulary.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from paligemma_jax.benchmark.resident import most_resident
from paligemma_jax.benchmark.timing import Sample, Stopwatch
from paligemma_jax.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import torch

_Result = TypeVar("_Result")


class HuggingFace:
    """A PaliGemmaForConditionalGeneration behind `Implementation`.

    Eagerly, `generate` grows a DynamicCache, and attention is what transformers chooses: PyTorch's
    fused one, but the plain one in the decoder of PaliGemma 2, which refuses the other. Compiled,
    it has a StaticCache and decodes through torch.compile, as its documentation says; so are the
    image encoder and the prefill here, which `generate` leaves eager.
    """

    def __init__(self, model: Any, *, compiled: bool):
        self._model = model
        self._compiled = compiled
        self._on_gpu = model.device.type == "cuda"
        self._generation = _compiled_generation(self._on_gpu) if compiled else _EAGER
        self._encode = self._faster(model.get_image_features)
        self._forward = self._faster(model.forward)

    def encode_images(self, images: np.ndarray) -> Callable[[], None]:
        """See `Implementation`."""
        pixels = self._pixels(images)

        def call() -> None:
            self._encode(pixels)

        return self._timed(call)

    def first_token(self, images: np.ndarray, tokens: np.ndarray) -> Callable[[], np.ndarray]:
        """See `Implementation`."""
        inputs = self.inputs(images, tokens)

        def call() -> np.ndarray:
            logits = self._forward(**inputs, use_cache=True, logits_to_keep=1).logits
            return _numbers(logits[:, -1].argmax(-1))

        return self._timed(call)

    def answer(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> Callable[[], np.ndarray]:
        """See `Implementation`."""
        inputs = self.inputs(images, tokens)
        return self._timed(lambda: self._generate(inputs, new_tokens))

    def decoding(
        self, images: np.ndarray, tokens: np.ndarray, new_tokens: int
    ) -> Callable[[], Sample]:
        """See `Implementation`."""
        inputs = self.inputs(images, tokens)

        def call() -> Sample:
            started = _Started(self._on_gpu)
            self._timed(lambda: self._generate(inputs, new_tokens, stopping_criteria=[started]))()
            assert started.watch is not None, "transformers asks what stops it after every token"
            return started.watch.stop()

        if self._compiled:  # one program for each length of the cache
            call()
        return call

    def _generate(
        self, inputs: "dict[str, torch.Tensor]", new_tokens: int, **options: Any
    ) -> np.ndarray:
        answers = self._model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            **options,
            **self._generation,
        )
        return _numbers(answers[:, inputs["input_ids"].shape[1] :])

    def logits(self, images: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """See `Implementation`; always eager."""
        inputs = self.inputs(images, tokens)

        def call() -> np.ndarray:
            logits = self._model(**inputs, logits_to_keep=1).logits[:, -1]
            # Rows of the table from the image token on are no tokens.
            return logits[:, : self._model.config.image_token_id].float().cpu().numpy()

        return self._timed(call)()

    def peak_bytes(self) -> int:
        """See `Implementation`."""
        import torch

        return torch.cuda.max_memory_allocated() if self._on_gpu else most_resident()

    def inputs(self, images: np.ndarray, tokens: np.ndarray) -> "dict[str, torch.Tensor]":
        """What PaliGemmaProcessor makes of pictures f32[B, H, W, 3] and prompts i32[B, T].

        Token types of 0 say that all of it is prefix, which sees itself in both directions.
        """
        import torch

        config = self._model.config
        pictures = np.full(
            (len(tokens), config.text_config.num_image_tokens), config.image_token_id
        )
        ids = np.concatenate([pictures, tokens], axis=1).astype(np.int64)
        where = self._model.device
        return {
            "input_ids": torch.tensor(ids, device=where),
            "attention_mask": torch.ones(ids.shape, dtype=torch.int64, device=where),
            "token_type_ids": torch.zeros(ids.shape, dtype=torch.int64, device=where),
            "pixel_values": self._pixels(images),
        }

    def _pixels(self, images: np.ndarray) -> "torch.Tensor":
        import torch

        pixels = torch.tensor(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
        return pixels.to(self._model.device, self._model.dtype)

    def _faster(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self._compiled:
            return function
        import torch

        torch._dynamo.config.capture_scalar_outputs = True  # or the check of the image's tokens
        return torch.compile(function, **_compile_options(self._on_gpu))

    def _timed(self, call: Callable[[], _Result]) -> Callable[[], _Result]:
        """`call` without gradients, to the end of the device's work."""
        import torch

        def whole() -> _Result:
            with torch.no_grad():
                result = self._explained(call)
            if self._on_gpu:
                torch.cuda.synchronize()
            return result

        return whole

    def _explained(self, call: Callable[[], _Result]) -> _Result:
        if not self._compiled:
            return call()
        try:
            return call()
        except Exception as e:  # torch.compile raises whatever its backends do
            raise _does_not_work(e) from e


class _Started:
    """A criterion that stops nothing, and starts a watch when the first token is there."""

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


_EAGER: dict[str, Any] = {"cache_implementation": "dynamic"}


def open_huggingface(weights: Path, dtype: str, *, compiled: bool = False) -> HuggingFace:
    """Loads the Hugging Face directory `weights` onto the GPU, if torch sees one.

    Raises:
      MissingExtraError: without torch or transformers.
      ConfigError: if `compiled`, where a static cache does not work: with PaliGemma 2.
    """
    model = load_huggingface(weights, dtype).eval()
    if compiled:
        _try_static_cache(HuggingFace(model, compiled=False))
    return HuggingFace(model, compiled=compiled)


def load_huggingface(weights: Path, dtype: str) -> Any:
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
    torch.set_num_threads(_cores())
    model: Any = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        weights, dtype=getattr(torch, dtype), local_files_only=True
    )
    return model.to("cuda") if torch.cuda.is_available() else model


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _try_static_cache(eager: HuggingFace) -> None:
    """One token with a static cache and without compilation, which would take its minutes first."""
    eager._generation = {"cache_implementation": "static", "disable_compile": True}
    size = eager._model.config.vision_config.image_size
    images, tokens = np.zeros((1, size, size, 3), np.float32), np.full((1, 1), 2, np.int32)
    try:
        eager.answer(images, tokens, 2)()
    except Exception as e:  # whatever transformers' own code runs into
        raise _does_not_work(e) from e


def _does_not_work(error: Exception) -> ConfigError:
    first = (str(error).splitlines() or [""])[0]
    return ConfigError(
        f"transformers cannot run this model with a static cache and torch.compile "
        f"({type(error).__name__}: {first}). Its eager loop fits. Measure the implementation "
        "huggingface instead."
    )


def _compile_options(on_gpu: bool) -> dict[str, Any]:
    """What transformers compiles `generate` with; there are no CUDA graphs without CUDA."""
    return {"mode": "reduce-overhead" if on_gpu else "default", "dynamic": False}


def _compiled_generation(on_gpu: bool) -> dict[str, Any]:
    import transformers

    compilation: Any = transformers.CompileConfig(**_compile_options(on_gpu))
    compilation._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compilation}


def _numbers(tokens: "torch.Tensor") -> np.ndarray:
    return tokens.cpu().numpy().astype(np.int32)
