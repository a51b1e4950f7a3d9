"""What a user calls a model -> the hub that has it, and what it is called there."""

import dataclasses
import os
import re
import urllib.parse
from pathlib import Path
from typing import TypeAlias

from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub.catalogue import CATALOGUE, find_published

MAIN = "main"
STORAGE = "https://storage.googleapis.com"
# The only published weights that need no account.
OPEN_COPIES = {
    "paligemma-3b-pt-224": "gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz",
}
_PART = re.compile(r"[\w][\w.-]*")
_HUGGING_FACE = ("huggingface.co", "hf.co")
_KAGGLE = ("kaggle.com", "www.kaggle.com")
_FRAMEWORKS = ("jax", "flax", "transformers", "pytorch", "keras", "gemmacpp")  # Kaggle's
_REVISION = re.compile(r"[\w][\w./-]*")


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A repository of models at Hugging Face; `revision` is a branch, tag or commit."""

    repository: str
    revision: str = MAIN

    def __str__(self) -> str:
        at = "" if self.revision == MAIN else f"@{self.revision}"
        return f"{self.repository}{at}"


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
    def variation(self) -> str:
        return self.handle.rsplit("/", 1)[1]


@dataclasses.dataclass(frozen=True)
class Web:
    """A file or a directory at an https address; `sha256` is what the file must have."""

    url: str
    sha256: str | None = None

    def __str__(self) -> str:
        return self.url


Source: TypeAlias = HuggingFace | Kaggle | Web


def find_source(name: str, revision: str | None = None) -> Source | None:
    """Where the weights of `name` can be downloaded; None if it is no name of any.

    Names are those of the catalogue and their aliases, "owner/repository" at Hugging Face, handles
    at Kaggle ("google/paligemma-2/jax/paligemma2-3b-pt-224"), and addresses (https, gs, hf,
    kaggle). "NAME@REVISION" is the same as `revision`.

    Raises CheckpointError for a revision that is none, or that is given where there are none.
    """
    if "://" in name:
        return _address(name, revision)
    bare, at, after = name.partition("@")
    if at:
        if revision not in (None, after):
            raise CheckpointError(
                f"{name} names the revision {after}, and the revision {revision} was given too. "
                f"One fits. Ask for: {bare}@{revision}"
            )
        name, revision = bare, after
    parts = name.strip("/").split("/")
    if parts[0].lower() == "keras" and len(parts) == 5 and parts[4].isdecimal():
        parts = parts[:4]  # the same weights in a format of its own, of any version
        name = "/".join(parts)
    entry = find_published(name)
    if entry is not None and (len(parts) < 3 or parts[0].lower() == "keras"):
        twin = parts[-1].lower() == f"{entry.name}-jax"
        return _hugging_face(entry.jax_repository if twin else entry.repository, revision)
    if not all(_PART.fullmatch(part) for part in parts):
        return None
    if len(parts) in (3, 4, 5) and parts[0].lower() in ("paligemma", "paligemma-2"):
        parts = ["google", *parts]
    if len(parts) == 4 or (len(parts) == 5 and parts[4].isdecimal()):
        return _kaggle(parts, revision) if parts[2].lower() in _FRAMEWORKS else None
    if len(parts) == 2 and not _is_here(name) and parts[0].lower() != "google":
        return _hugging_face(name, revision)
    return None


def _is_here(name: str) -> bool:
    """Whether a path with a slash starts in a directory that exists: a mistyped path."""
    return Path(name).parent.exists()


def _hugging_face(repository: str, revision: str | None) -> HuggingFace:
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise CheckpointError(
            f"{revision!r} is no revision. A branch, a tag or a commit of {repository} fits, such "
            "as main. Leave it out for main."
        )
    _require_plain(repository)
    return HuggingFace(repository, revision or MAIN)


def _kaggle(parts: list[str], revision: str | None) -> Kaggle:
    handle = "/".join(parts[:4])
    _require_plain(handle)
    precisions = {MAIN: "float32", "float32": "float32"} | {
        name: name for name in ("float16", "bfloat16")
    }
    if revision is not None and revision not in precisions:
        raise CheckpointError(
            f"{handle} at Kaggle has no revision {revision}. float32, float16 and bfloat16 choose "
            f"between its files; a version is a part of the handle. Ask for: {handle}/1"
        )
    version = int(parts[4]) if len(parts) == 5 else None
    return Kaggle(handle, version, None if revision is None else precisions[revision])


def _require_plain(name: str) -> None:
    """Names become directories of a cache: nothing may lead out of it."""
    if not all(_PART.fullmatch(part) for part in name.split("/")):
        raise CheckpointError(
            f"{name!r} is no name of a model. Letters, digits, '-', '_' and '.' fit, with one / "
            "between owner and model. See the published ones with: paligemma models"
        )


def _address(address: str, revision: str | None) -> Source:
    scheme, _, rest = address.partition("://")
    scheme = scheme.lower()
    if scheme in ("hf", "kaggle"):
        source = find_source(rest, revision)
        if source is None:
            raise _no_address(address)
        return source
    if scheme == "gs":
        return _web(f"{STORAGE}/{urllib.parse.quote(rest)}", revision)
    url = urllib.parse.urlsplit(address)
    parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
    if url.hostname in _HUGGING_FACE and 2 <= len(parts) and "resolve" not in parts[2:3]:
        at = "/".join(parts[3:]) if parts[2:3] in (["tree"], ["commit"]) else None
        return _hugging_face("/".join(parts[:2]), revision or at)
    if url.hostname in _KAGGLE and parts[0] == "models" and len(parts) in (5, 6):
        return _kaggle(parts[1:], revision)
    return _web(address, revision)


def _web(address: str, revision: str | None) -> Web:
    url, _, fragment = address.partition("#")
    check_address(url)
    if revision is not None:
        raise CheckpointError(
            f"{url} has no revisions. They are those of repositories at Hugging Face. Leave the "
            "revision out."
        )
    digest = fragment.removeprefix("sha256=").lower() if fragment else None
    if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
        raise CheckpointError(
            f"#{fragment} is no digest of a file. 64 hexadecimal digits fit. Write: "
            f"{url}#sha256=0123abcd..."
        )
    return Web(url, digest)


def check_address(url: str) -> None:
    """Raises CheckpointError for what must not be downloaded from: anything but https.

    A server on this very machine may do without, and the one that HF_ENDPOINT names.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1"):
        return
    chosen = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "")
    if parts.scheme == "http" and (parts.scheme, parts.netloc) == (chosen.scheme, chosen.netloc):
        return
    if parts.scheme == "http":
        raise CheckpointError(
            f"{url} is no safe address: anybody on the way could change the weights. One that "
            f"starts with https:// fits. Try: https://{url.partition('://')[2]}"
        )
    raise _no_address(url)


def _no_address(url: str) -> CheckpointError:
    return CheckpointError(
        f"{url} is no address that models are downloaded from. https://..., gs://BUCKET/FILE, "
        "hf://OWNER/NAME and kaggle://OWNER/MODEL/FRAMEWORK/VARIATION fit. See the published ones "
        "with: paligemma models"
    )


def open_copy(repository: str) -> str | None:
    """Address of the same weights that needs no account, if there is one."""
    name = repository.removeprefix("google/").removesuffix("-jax")
    return OPEN_COPIES.get(name) if name in CATALOGUE else None
