"""Every published model under every name that it has anywhere, and where it can be downloaded.

Scores: big_vision's README (PaliGemma, arXiv 2407.07726) and the model cards of the DOCCI ones
(PaliGemma 2, arXiv 2412.03555). The model cards' own words for tasks are not repeated here.
"""

import dataclasses
import os
import re
import urllib.parse
from pathlib import Path
from typing import TypeAlias

from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Score:
    """A published result; `values` has one number for each part that `metric` names."""

    metric: str
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.metric} {' / '.join(f'{value:g}' for value in self.values)}"


# Of each task: what the model is for, the metric, and its published scores at 224, 448 and, where
# there are three, 896 pixels; a slash separates the parts that the metric names.
_TASKS = {
    "ai2d": ("questions about science diagrams", "accuracy", "72.12 73.28"),
    "aokvqa-da": ("questions that need knowledge, answered freely", "accuracy", "61.85 63.22"),
    "aokvqa-mc": ("questions that need knowledge, with choices", "accuracy", "76.37 76.9"),
    "coco35l": ("captions in 35 languages", "CIDEr en / avg-34 / avg",
        "139.2/115.8/116.4 141.2/118.0/118.6"),
    "cococap": ("captions", "CIDEr", "141.92 144.6"),
    "docvqa": ("questions about documents", "ANLS", "43.74 78.02 84.77"),
    "gqa": ("questions about scenes and relations", "accuracy", "65.61 67.03"),
    "infovqa": ("questions about infographics", "ANLS", "28.46 40.47 47.75"),
    "nlvr2": ("is a sentence true of two images", "accuracy", "90.02 88.93"),
    "ocrvqa": ("questions about book covers", "accuracy", "73.24 75.6 75.9"),
    "okvqa": ("questions that need knowledge", "accuracy", "63.54 63.15"),
    "refcoco-seg": ("masks of what is described", "mIoU refcoco / + / g",
        "73.4/68.32/67.65 75.57/69.76/70.17 76.94/72.18/72.22"),
    "rsvqa-hr": ("questions about aerial images, fine", "accuracy test / test2",
        "92.61/90.58 92.79/90.54"),
    "rsvqa-lr": ("questions about aerial images, coarse", "accuracy", "92.65 93.11"),
    "scicap": ("captions of scientific figures", "CIDEr / BLEU-4", "162.25/0.192 181.49/0.211"),
    "science-qa": ("science questions with choices", "accuracy", "95.39 95.93"),
    "screen2words": ("summaries of phone screens", "CIDEr", "117.57 119.59"),
    "stvqa": ("questions about text in scenes", "ANLS", "63.29 81.82 84.4"),
    "tallyqa": ("counting", "accuracy simple / complex", "81.72/69.56 84.86/72.27"),
    "textcaps": ("captions that read the text", "CIDEr", "127.48 153.94"),
    "textvqa": ("questions about text in images", "accuracy", "55.47 73.15 76.48"),
    "vizwizvqa": ("questions of blind people", "accuracy", "73.7 75.52"),
    "vqav2": ("questions about photos", "accuracy test-std", "83.19 85.64"),
    "widgetcap": ("captions of parts of screens", "CIDEr", "136.07 148.36"),
}  # fmt: skip
# Sentences that the image does not entail: fewer are better.
_DOCCI = {"3b": 28.4, "10b": 20.3}
_NAME = re.compile(r"paligemma(2?)-(\d+b)-(pt|mix|ft)(?:-(.+))?-(\d+)")
_GENERAL = {
    "pt": "for fine-tuning",
    "mix": "captions, answers, boxes, masks, reading",
    "ft": "long, detailed descriptions",
}
# Versions of Roboflow's model "paligemma-pretrains".
_ROBOFLOW = {
    "mix-224": 1, "mix-448": 20,
    "ft-cococap-224": 8, "ft-screen2words-224": 9, "ft-vqav2-224": 10,
    "ft-tallyqa-224": 11, "ft-docvqa-224": 12, "ft-ocrvqa-224": 13,
    "ft-cococap-448": 14, "ft-screen2words-448": 15, "ft-vqav2-448": 16,
    "ft-tallyqa-448": 17, "ft-docvqa-448": 18, "ft-ocrvqa-448": 19,
}  # fmt: skip
STORAGE = "https://storage.googleapis.com"
# The only published weights that need no account.
OPEN_COPIES = {
    "paligemma-3b-pt-224": "gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz",
}


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A published model.

    Attributes:
      name: as in `VARIANTS`, and behind "google/" at Hugging Face.
      generation: 1 or 2.
      size: of the whole, as its name says: "3b", "10b" or "28b".
      kind: "pt" (pretrained), "mix" (of many tasks) or "ft" (fine-tuned for one).
      task: of a fine-tuned one, as in the name; "" for others.
      resolution: pixels a side.
      use: what it is for.
      score: what was published for a fine-tuned one.
    """

    name: str
    generation: int
    size: str
    kind: str
    task: str
    resolution: int
    use: str
    score: Score | None

    @property
    def config(self) -> PaliGemmaConfig:
        return VARIANTS[self.name]

    @property
    def repository(self) -> str:
        """At Hugging Face, as safetensors."""
        return f"google/{self.name}"

    @property
    def jax_repository(self) -> str:
        """At Hugging Face, as big_vision's npz."""
        return f"google/{self.name}-jax"

    @property
    def revisions(self) -> tuple[str, ...]:
        """Branches at Hugging Face; `main` has float32 for PaliGemma, bfloat16 for PaliGemma 2."""
        return ("main", "bfloat16", "float16") if self.generation == 1 else ("main",)

    @property
    def kaggle(self) -> str | None:
        """Handle of big_vision's npz at Kaggle; None where it is not known."""
        if self.generation == 2:
            return f"google/paligemma-2/jax/{self.name}"
        return None if self.kind == "ft" else f"google/paligemma/jax/{self.name}"

    @property
    def keras_preset(self) -> str | None:
        """Name of the same weights in KerasHub."""
        return next(iter(self._keras_presets), None)

    @property
    def _keras_presets(self) -> list[str]:
        """The name in KerasHub, then other spellings of it."""
        if self.generation == 1:
            kind = "" if self.kind == "pt" else "mix_"
            return [] if self.kind == "ft" else [f"pali_gemma_3b_{kind}{self.resolution}"]
        kind = f"ft_{self.task}" if self.kind == "ft" else self.kind
        family = "pali_gemma_2" if (self.kind, self.size) == ("ft", "3b") else "pali_gemma2"
        names = [f"{family}_{kind}_{self.size}_{self.resolution}"]
        if self.kind == "ft" or (self.kind, self.size) == ("mix", "28b"):
            names.append(f"pali_gemma2_{self.size}_{kind}_{self.resolution}")
        return names

    @property
    def aliases(self) -> tuple[str, ...]:
        """Every other name of these weights, in lower case, without "google/"."""
        family = "paligemma" if self.generation == 1 else "paligemma2"
        roboflow = _ROBOFLOW.get(self.name.removeprefix("paligemma-3b-"))
        return (
            f"{self.name}-jax",
            f"{self.name}-keras",
            *self._keras_presets,
            *(f"keras/{family}/keras/{preset}" for preset in self._keras_presets),
            *([self.kaggle.removeprefix("google/")] if self.kaggle else []),
            *([f"paligemma-pretrains/{roboflow}"] if roboflow else []),
        )


def _model_info(name: str) -> ModelInfo:
    match = _NAME.fullmatch(name)
    assert match, name
    two, size, kind, task, resolution = match.groups()
    use, score = _GENERAL[kind], None
    if task == "docci":
        score = Score("NES (lower is better)", (_DOCCI[size],))
    if task in _TASKS:
        use, metric, scores = _TASKS[task]
        values = scores.split()[("224", "448", "896").index(resolution)]
        score = Score(metric, tuple(map(float, values.split("/"))))
    return ModelInfo(name, 2 if two else 1, size, kind, task or "", int(resolution), use, score)


MODELS: dict[str, ModelInfo] = {name: _model_info(name) for name in VARIANTS}
_BY_NAME = {name: model for model in MODELS.values() for name in (*model.aliases, model.name)}


def find_model(name: str) -> ModelInfo | None:
    """The model of a published name or alias, in any case, with or without its owner."""
    return _BY_NAME.get(name.lower().removeprefix("google/"))


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A repository of models at Hugging Face; `revision` is a branch, tag or commit."""

    repository: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repository + ("" if self.revision == "main" else f"@{self.revision}")

    @property
    def page(self) -> str:
        """Its address, at the hub that HF_ENDPOINT names."""
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/{self.repository}"


@dataclasses.dataclass(frozen=True)
class Kaggle:
    """A model at Kaggle: "owner/model/framework/variation", and its version or the newest.

    `precision` chooses between files of the same weights: "float32", "float16" or "bfloat16".
    """

    handle: str
    version: int | None = None
    precision: str | None = None

    def __str__(self) -> str:
        return self.handle if self.version is None else f"{self.handle}/{self.version}"

    @property
    def page(self) -> str:
        """Its address."""
        return f"https://www.kaggle.com/models/{self.handle}"


@dataclasses.dataclass(frozen=True)
class Web:
    """A file or a directory at an https address; `sha256` is what the file must have."""

    url: str
    sha256: str | None = None

    def __str__(self) -> str:
        return self.url


Location: TypeAlias = HuggingFace | Kaggle | Web

_NAME_PART = re.compile(r"[\w][\w.-]*")
_REVISION = re.compile(r"[\w][\w./-]*")
_FRAMEWORKS = ("jax", "flax", "transformers", "pytorch", "keras", "gemmacpp")  # Kaggle's


def find_location(name: str, revision: str | None = None) -> Location | None:
    """Where the weights of `name` can be downloaded; None if it is no name of any.

    Names are those of the catalogue and their aliases, "owner/repository" at Hugging Face, handles
    at Kaggle ("google/paligemma-2/jax/paligemma2-3b-pt-224"), and addresses (https, gs, hf,
    kaggle). "NAME@REVISION" is the same as `revision`.

    Raises CheckpointError for a revision that is none, or that is given where there are none.
    """
    scheme, separator, rest = name.partition("://")
    if separator and scheme.lower() not in ("hf", "kaggle"):
        return _address(name, revision)
    bare, at, after = (rest or name).partition("@")
    if at and revision not in (None, after):
        raise CheckpointError(
            f"{name} names the revision {after}, and {revision} was given too. Ask for one: "
            f"{bare}@{revision}"
        )
    revision = after if at else revision
    parts = bare.rstrip("/").split("/")
    if parts[0].lower() == "keras" and len(parts) == 5 and parts[4].isdecimal():
        parts = parts[:4]  # the same weights in a format of its own, of any version
    model = find_model("/".join(parts))
    if model is not None and (len(parts) < 3 or parts[0].lower() == "keras"):
        is_jax = parts[-1].lower() == f"{model.name}-jax"
        return _hugging_face(model.jax_repository if is_jax else model.repository, revision)
    if parts[0].lower() in ("paligemma", "paligemma-2") and len(parts) >= 3:
        parts = ["google", *parts]
    if all(_NAME_PART.fullmatch(part) for part in parts):
        if len(parts) == 4 or (len(parts) == 5 and parts[4].isdecimal()):
            if parts[2].lower() in _FRAMEWORKS:
                return _kaggle(parts, revision)
        # A name that starts with a directory that exists is a mistyped path.
        elif len(parts) == 2 and parts[0].lower() != "google" and not Path(parts[0]).exists():
            return _hugging_face("/".join(parts), revision)
    if separator:
        raise _no_model(name)
    return None


def _hugging_face(repository: str, revision: str | None) -> HuggingFace:
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise CheckpointError(
            f"{revision!r} is no revision: expected a branch, a tag or a commit of {repository}. "
            "Leave it out for main."
        )
    return HuggingFace(_plain(repository), revision or "main")


def _kaggle(parts: list[str], revision: str | None) -> Kaggle:
    handle = _plain("/".join(parts[:4]))
    precision = "float32" if revision == "main" else revision
    if precision not in (None, "float32", "float16", "bfloat16"):
        raise CheckpointError(
            f"{handle} at Kaggle has no revision {revision}: expected float32, float16 or "
            f"bfloat16. A version is a part of the handle: {handle}/1"
        )
    return Kaggle(handle, int(parts[4]) if len(parts) == 5 else None, precision)


def _plain(name: str) -> str:
    """Names become directories of a cache: nothing may lead out of it."""
    if all(_NAME_PART.fullmatch(part) for part in name.split("/")):
        return name
    raise _no_model(name)


def _no_model(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name!r} is no name or address of a model: expected OWNER/MODEL, https://..., "
        "gs://BUCKET/FILE, hf://OWNER/NAME or kaggle://OWNER/MODEL/FRAMEWORK/VARIATION. See: "
        "paligemma models"
    )


def _address(address: str, revision: str | None) -> Location:
    if address.lower().startswith("gs://"):
        address = f"{STORAGE}/{urllib.parse.quote(address[5:], safe='/#=')}"
    url = urllib.parse.urlsplit(address)
    parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
    is_page = len(parts) > 1 and parts[2:3] != ["resolve"]
    if url.hostname in ("huggingface.co", "hf.co") and is_page:
        at = "/".join(parts[3:]) if parts[2:3] in (["tree"], ["commit"]) else None
        return _hugging_face("/".join(parts[:2]), revision or at)
    if url.hostname in ("kaggle.com", "www.kaggle.com") and len(parts) in (5, 6):
        return _kaggle(parts[1:], revision)
    bare, _, fragment = address.partition("#")
    check_address(bare)
    if revision is not None:
        raise CheckpointError(
            f"{bare} has no revisions, which repositories at Hugging Face have. Leave it out."
        )
    checksum = fragment.removeprefix("sha256=").lower() or None
    if checksum is not None and not re.fullmatch("[0-9a-f]{64}", checksum):
        raise CheckpointError(
            f"#{fragment} is no checksum: expected 64 digits as in {bare}#sha256=0123abcd..."
        )
    return Web(bare, checksum)


def check_address(url: str) -> None:
    """Raises CheckpointError for what must not be downloaded from: anything but https.

    A server on this very machine may do without, and the one that HF_ENDPOINT names.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme != "http":
        raise _no_model(url)
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "")
    is_local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not is_local and (parts.scheme, parts.netloc) != (endpoint.scheme, endpoint.netloc):
        raise CheckpointError(
            f"{url} is no safe address: anybody on the way could change the weights. Try: "
            f"https://{url.partition('://')[2]}"
        )
