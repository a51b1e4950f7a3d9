"""transformers' PaliGemma as an implementation to measure, run as its users run it.

Letters: B rows, H W pixels, T prompt tokens, P image tokens a picture, V vocabulary.

New LoRA adapters as a PEFT directory, for every implementation to begin training from.

What an adapter begins with is random, and decides the losses after the first step.

transformers' PaliGemma trained as its Trainer does it, with PEFT where adapters are trained.

Random weights for checkpoints that are measured and not asked: made fast, and tame in any depth.

Values are read at random places of a table of normal quantiles, 16 random bits each: a few
nanoseconds a weight in any dtype, and equal in all dtypes but for rounding.

What lies beside the weights in a published Hugging Face repository, for any configuration.

A Hugging Face directory of random weights, written one tensor at a time.

Checkpoints of random weights in Hugging Face's layout: the same for every implementation.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from paligemma_jax.benchmark.subjects import (
    Precision,
    Sample,
    Stopwatch,
    Task,
    TrainInputs,
    TrainSteps,
    forget_most_resident,
    most_resident,
)
from paligemma_jax.config import GemmaConfig, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError, MissingExtraError
from paligemma_jax.filesystem import staged
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES, PieceType, bpe_model
from paligemma_jax.weights.hf_config import hf_generation, hf_preprocessor
from paligemma_jax.weights.huggingface import (
    EMBEDDING,
    HFTensor,
    hf_tensors,
    part_shape,
    published_key,
)
from paligemma_jax.weights.safetensors_io import write_shards, write_tensors
from paligemma_jax.weights.tensors import FLOATS, TensorSpec, as_float_dtype, expected_shapes

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


RANK = 8
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_directory(weights: Path, config: PaliGemmaConfig) -> Path:
    """The adapters that belong to the checkpoint `weights`; written if they are not there yet.

    On every product of the language model's layers, of rank 8 and scale 1: lora_A uniform within
    1/sqrt(inputs), as PEFT draws it, and lora_B zero.
    """
    folder = weights.with_name(f"{weights.name}-lora{RANK}")
    if folder.exists():
        return folder
    tensors = dict(_tensors(config))
    with staged(folder, sum(tensor.nbytes for tensor in tensors.values())) as directory:
        values = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": RANK,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": rf".*language_model.*\.({'|'.join(_MODULES)})",
        }
        (directory / "adapter_config.json").write_text(json.dumps(values, indent=2))
        write_tensors(directory / "adapter_model.safetensors", tensors)
    return folder


def _tensors(config: PaliGemmaConfig):
    ours = expected_shapes(config)
    for tensor in hf_tensors(config):
        if tensor.key.rpartition(".")[0].rpartition(".")[2] not in _MODULES:
            continue
        if not tensor.path.startswith("llm/layers/"):
            continue
        depth, *whole = ours[tensor.path]
        outs, ins = tensor.shape(tuple(whole if tensor.part is None else whole[1:]))
        for layer in range(depth):
            name = f"base_model.model.model.{tensor.key.format(layer).removesuffix('.weight')}"
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            bound = ins**-0.5
            a = rng.uniform(-bound, bound, (RANK, ins)).astype(np.float32)
            yield f"{name}.lora_A.weight", a
            yield f"{name}.lora_B.weight", np.zeros((outs, RANK), np.float32)


IGNORED = -100  # as a label


class HuggingFaceTrainer:
    """A PaliGemmaForConditionalGeneration behind `Trainer`.

    What `Trainer(bf16=True, gradient_checkpointing=True)` does at each step, without its logging:
    forward under autocast (in bfloat16), backward, clipping, fused AdamW.
    """

    def __init__(self, model: Any, batch: dict[str, Any], autocast: bool, learning_rate: float):
        import torch

        self._model, self._batch = model, batch
        self._where = batch["input_ids"].device.type
        self._autocast = autocast
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
            fused=True,
        )  # fmt: skip

    def step(self) -> float:
        """See `Trainer`."""
        import torch

        with torch.autocast(self._where, torch.bfloat16, enabled=self._autocast):
            loss = self._model(**self._batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._where == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    def forget_peak(self) -> None:
        """See `Trainer`."""
        import torch

        if self._where == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_most_resident()

    def peak_bytes(self) -> int:
        """See `Trainer`."""
        import torch

        return torch.cuda.max_memory_allocated() if self._where == "cuda" else most_resident()


def open_huggingface_trainer(
    weights: Path, config: PaliGemmaConfig, dtype: Precision, case: TrainSteps
) -> HuggingFaceTrainer:
    """Loads the Hugging Face directory: masters in float32, frozen weights in `dtype`.

    Raises MissingExtraError without torch, transformers or, for adapters, peft.
    """
    lora = case.task is Task.LORA
    model = load_huggingface(weights, dtype.value if lora else Precision.FLOAT32.value)
    model.config.use_cache = False
    # Without the rows that fill up the table, which would be a part of its softmax alone.
    model.resize_token_embeddings(config.llm.vocab_size)
    model.model.vocab_size = config.llm.vocab_size  # left as it was: image tokens lie beyond now
    batch = _batch(model, case.inputs(config))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora:
        model = _with_adapters(model, adapter_directory(weights, config))
    autocast = dtype is not Precision.FLOAT32
    return HuggingFaceTrainer(model.train(), batch, autocast, case.learning_rate)


def _with_adapters(model: Any, directory: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as e:
        raise MissingExtraError("Measuring PEFT", "parity") from e
    load: Callable[..., Any] = PeftModel.from_pretrained
    return load(model, directory, is_trainable=True)


def _batch(model: Any, inputs: TrainInputs) -> dict[str, Any]:
    """What PaliGemmaProcessor makes of prompts and suffixes: token types are 1 in suffixes."""
    import torch

    config = model.config
    rows, where = len(inputs.tokens), model.device
    pictures = np.full((rows, config.text_config.num_image_tokens), config.image_token_id)
    ids = np.concatenate([pictures, inputs.tokens], axis=1).astype(np.int64)
    types = np.concatenate([np.zeros_like(pictures), inputs.in_suffix], axis=1).astype(np.int64)
    pixels = torch.tensor(np.ascontiguousarray(np.moveaxis(inputs.images, -1, 1)))
    return {
        "input_ids": torch.tensor(ids, device=where),
        "attention_mask": torch.ones(ids.shape, dtype=torch.int64, device=where),
        "token_type_ids": torch.tensor(types, device=where),
        "labels": torch.tensor(np.where(types == 1, ids, IGNORED), device=where),
        "pixel_values": pixels.to(where, model.dtype),
    }


FILLER_ROWS = 64  # Hugging Face pads its table to a multiple of 64, the image placeholder included
_EOS = 1
_UNLIKELY = 2.0**-8  # of rows whose logits shall never be the highest
_BLOCK = 65_536  # values made at once; they and the table stay in the cache

Shape = tuple[int, ...]


class RandomTensors:
    """Every tensor of a checkpoint in Hugging Face's layout, from a configuration and a seed.

    Weights are scaled by their fan-in, so that activations keep their size. Decoder blocks add much
    more to the residual stream than the token put into it: otherwise the tied table would answer
    every token with itself. Logits have a deviation of about 1. Those of EOS and of the rows that
    fill the table up are near 0, so that no answer ends and none holds a token that is no token.

    Attributes:
      entries: canonical key -> the tensor's row of the table of names, its layer, and its shape,
        filler rows included.
    """

    def __init__(self, config: PaliGemmaConfig, *, seed: int, dtype: str):
        self._config = config
        self._seed = seed
        self._dtype = FLOATS[dtype]
        ours = expected_shapes(config)
        self.entries: dict[str, tuple[HFTensor, int, Shape]] = {}
        for tensor in hf_tensors(config):
            shape = tensor.shape(part_shape(tensor, ours[tensor.path]))
            if tensor.key == EMBEDDING:
                shape = (shape[0] + FILLER_ROWS, *shape[1:])
            for layer in range(ours[tensor.path][0] if tensor.layered else 1):
                self.entries[tensor.key.format(layer)] = (tensor, layer, shape)

    def nbytes(self, key: str) -> int:
        """Bytes of one tensor."""
        return math.prod(self.entries[key][2]) * self._dtype.itemsize

    def blocks(self, key: str) -> Iterator[np.ndarray]:
        """One tensor as consecutive groups of whole rows of its leading axis."""
        tensor, layer, shape = self.entries[key]
        table = _quantiles(*_spread(tensor, layer, shape, self._config.llm), self._dtype)
        random = np.random.SFC64([self._seed, zlib.crc32(key.encode())])
        row = math.prod(shape[1:])
        step = max(1, _BLOCK // row)
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            places = random.random_raw(-(-rows * row // 4)).view(np.uint16)[: rows * row]
            values = table.take(places).reshape(rows, *shape[1:])
            if tensor.key == EMBEDDING:
                place = np.arange(start, start + rows)
                unlikely = (place == _EOS) | (place >= self._config.llm.vocab_size)
                values[unlikely] *= values.dtype.type(_UNLIKELY)
            yield values

    def whole(self, key: str) -> np.ndarray:
        """One tensor."""
        return np.concatenate(list(self.blocks(key)))


def _spread(tensor: HFTensor, layer: int, shape: Shape, llm: GemmaConfig) -> tuple[float, float]:
    """Mean and standard deviation of a tensor of `shape` (out, in, ...)."""
    path = tensor.path
    name = path.rpartition("/")[2]
    if name == "bias":
        return 0.0, 0.05
    if name == "pos_embed":
        return 0.0, 0.5
    if path.startswith("img/"):
        return (1.0, 0.1) if name == "scale" else (0.0, _by_fan_in(shape))
    if name == "scale":
        gain = _block_gain(path, layer, llm)
        return gain - 1, 0.1 * gain  # Gemma's RMSNorm is stored less one
    if path.endswith("q_einsum/w"):
        return 0.0, 2 * _by_fan_in(shape)  # attention that looks somewhere
    gain = 1.0 if llm.post_norms else _block_gain(path, layer, llm)
    return 0.0, gain * _by_fan_in(shape)


def _by_fan_in(shape: Shape) -> float:
    return math.prod(shape[1:]) ** -0.5


def _block_gain(path: str, layer: int, llm: GemmaConfig) -> float:
    """How much larger than its input the output of a decoder's block is; 1 inside blocks.

    Together the blocks make the residual stream width**0.5 times a token's embedding. The first
    attention adds no more than the token, which would be lost in what all positions have in common.
    """
    gain = max(1.0, 1.5 * (llm.width / llm.depth) ** 0.5)
    if path.endswith(("mlp/linear/w", "post_ffw_norm/scale")):
        return gain
    if path.endswith(("attn_vec_einsum/w", "post_attention_norm/scale")):
        return gain / 2 if layer else 1.0
    return 1.0


@functools.cache
def _normal_quantiles() -> np.ndarray:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65_536) for i in range(65_536)])


def _quantiles(mean: float, deviation: float, dtype: np.dtype) -> np.ndarray:
    return (mean + deviation * _normal_quantiles()).astype(dtype)


_CHARACTERS = "\u2581" + "".join(map(chr, range(33, 127)))


def hub_config(config: PaliGemmaConfig, dtype: str) -> dict[str, Any]:
    """config.json with the fields that published files have, and without those they omit."""
    img, llm = config.img, config.llm
    tokens = {"num_image_tokens": img.num_patches, "torch_dtype": dtype}
    text: dict[str, Any] = {
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_dim,
        "model_type": "gemma",
        "num_hidden_layers": llm.depth,
        "num_key_value_heads": llm.num_kv_heads,
        "vocab_size": llm.vocab_size + FILLER_ROWS,
        **tokens,
    }
    if llm.head_dim != 256:
        text["head_dim"] = llm.head_dim
    if not llm.post_norms or llm.num_heads != 8:
        text["num_attention_heads"] = llm.num_heads
    if llm.post_norms:
        text |= {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            "attn_logit_softcapping": llm.attn_logit_softcap,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 107],
            "final_logit_softcapping": llm.final_logit_softcap or None,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": round(llm.query_scale**-2),
            "sliding_window": 4096,
        }
    vision: dict[str, Any] = {
        "hidden_size": img.width,
        "intermediate_size": img.mlp_dim,
        "model_type": "siglip_vision_model",
        "num_attention_heads": img.num_heads,
        "num_hidden_layers": img.depth,
        "patch_size": img.patch_size,
        "projection_dim": llm.width,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
        **tokens,
    }
    if img.image_size != 224:
        vision["image_size"] = img.image_size
    return {
        "_vocab_size": llm.vocab_size,
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "ignore_index": -100,
        "image_token_index": llm.vocab_size,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": llm.width,
        "text_config": text,
        "torch_dtype": dtype,
        "transformers_version": "4.47.0",
        "vision_config": vision,
        "hidden_size": 2048,  # stale in published files of PaliGemma 2
    }


def smallest_vocabulary() -> int:
    """Pieces that `make_tokenizer` cannot do without."""
    return 4 + 256 + 1 + len(_CHARACTERS) + len(LOC_PIECES) + len(SEG_PIECES)


def make_tokenizer(vocab_size: int) -> bytes:
    """A SentencePiece model: bytes, ASCII, filler that no text reaches, `<loc>` and `<seg>`."""
    pieces = [("<pad>", 0.0, PieceType.CONTROL), ("<eos>", 0.0, PieceType.CONTROL)]
    pieces += [("<bos>", 0.0, PieceType.CONTROL), ("<unk>", 0.0, PieceType.UNKNOWN)]
    pieces += [(f"<0x{i:02X}>", 0.0, PieceType.BYTE) for i in range(256)]
    pieces += [("\n", 0.0, PieceType.USER_DEFINED)]
    pieces += [(c, -float(i), PieceType.NORMAL) for i, c in enumerate(_CHARACTERS)]
    extra = LOC_PIECES + SEG_PIECES
    filler = vocab_size - smallest_vocabulary()
    if filler < 0:
        raise ValueError(f"{vocab_size} pieces do not hold bytes, ASCII, <loc> and <seg>")
    # No piece spells a part of these, so no text is ever merged into them.
    pieces += [(f"\ue000{i:06}", -1e6 - i, PieceType.NORMAL) for i in range(filler)]
    pieces += [(piece, 0.0, PieceType.USER_DEFINED) for piece in extra]
    return bpe_model(pieces)


def write_hugging_face(
    directory: Path,
    config: PaliGemmaConfig,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = 5_000_000_000,
    rename: Callable[[str], str] = published_key,
) -> None:
    """A directory as published: old key layout, shards with an index, sparse configs.

    `rename` maps canonical keys to another layout. One shard makes a single model.safetensors.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = RandomTensors(config, seed=seed, dtype=dtype)
    specs = {
        rename(k): TensorSpec(shape, FLOATS[dtype]) for k, (*_, shape) in tensors.entries.items()
    }
    with write_shards(directory, specs, shard_bytes) as shards:
        for key in tensors.entries:
            row = 0
            for block in tensors.blocks(key):
                shards.write(rename(key), block, row)
                row += len(block)
    _write_json(directory / "config.json", hub_config(config, dtype))
    _write_json(directory / "generation_config.json", hf_generation(config))
    _write_json(directory / "preprocessor_config.json", hf_preprocessor(config))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2))


_RECORD = "random-weights.json"
_VERSION = 1  # of the values: another one makes other weights from the same seed
_PUBLISHED_CAP = 30.0  # on PaliGemma 2's logits, in Hugging Face's files


def write_checkpoint(
    folder: Path, config: PaliGemmaConfig, *, seed: int = 0, dtype: str = "bfloat16"
) -> Path:
    """Writes random weights for `config` as a Hugging Face repository, and returns `folder`.

    Equal arguments give equal files, and files that are there already are taken as they are. All
    weights differ from zero, answers neither end nor repeat one token, and the tokenizer, where the
    vocabulary has room for one, spells in single characters. As in the published repositories,
    PaliGemma 2 has a soft-cap of 30 on its logits. A `sliding_window` is written where `config` has
    one; without, one that is never reached.

    One tensor is in memory at a time. The directory appears when it is complete.

    Raises:
      CheckpointError: if `folder` exists and holds something else, or cannot be written.
    """
    dtype = as_float_dtype(dtype).name
    if config.llm.post_norms and not config.llm.final_logit_softcap:
        llm = dataclasses.replace(config.llm, final_logit_softcap=_PUBLISHED_CAP)
        config = dataclasses.replace(config, llm=llm)
    record = {"version": _VERSION, "seed": seed, "dtype": dtype, "config": config.to_dict()}
    if folder.exists() and _reuse(folder, record):
        return folder
    tensors = RandomTensors(config, seed=seed, dtype=dtype)
    nbytes = sum(tensors.nbytes(key) for key in tensors.entries)
    with staged(folder, nbytes) as directory:
        write_hugging_face(directory, config, seed=seed, dtype=dtype)
        _set_window(directory / "config.json", config)
        vocabulary = config.llm.vocab_size
        if vocabulary >= smallest_vocabulary():
            (directory / "tokenizer.model").write_bytes(make_tokenizer(vocabulary))
        (directory / _RECORD).write_text(json.dumps(record, indent=2))
    return folder


def _reuse(folder: Path, record: dict[str, Any]) -> bool:
    """Whether `folder` is what would be written; removes what an earlier version has written."""
    try:
        found = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        found = {}
    if found == record:
        return True
    if found.get("version") not in (None, _VERSION):
        shutil.rmtree(folder)
        return False
    raise CheckpointError(
        f"{folder} holds something else than these random weights. A new or an equal directory "
        f"fits. Choose another one, or remove it: rm -r {folder}"
    )


def _set_window(path: Path, config: PaliGemmaConfig) -> None:
    """Makes the window of config.json the one of `config`, which a published file does not tell."""
    values = json.loads(path.read_text())
    text = values["text_config"]
    if "sliding_window" in text:
        patches = 2 ** math.ceil(math.log2(config.img.num_patches))
        never = max(text["sliding_window"], 2 * patches)
        text["sliding_window"] = config.llm.sliding_window or never
        path.write_text(json.dumps(values, indent=2))
