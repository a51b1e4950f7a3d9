"""From a location to files on disk: Hugging Face, Kaggle, or any https address.

What is in the cache of its hub is used without asking, and without the hub's client. Files of
Hugging Face and of other addresses come by `hub.http`, which resumes and checks them; Kaggle's by
its own client. Hugging Face's cache has a documented layout that its libraries share:
blobs/CHECKSUM, snapshots/COMMIT/FILE linking there, refs/BRANCH.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from paligemma_jax.errors import CheckpointError, MissingExtraError
from paligemma_jax.filesystem import locked, user_cache
from paligemma_jax.hub import http
from paligemma_jax.hub.catalogue import (
    OPEN_COPIES,
    STORAGE,
    HuggingFace,
    Kaggle,
    Location,
    ModelInfo,
    Web,
    find_location,
    find_model,
)
from paligemma_jax.hub.files import (
    INDEX,
    MANIFEST,
    MASK_CODECS,
    SETTINGS,
    SINGLE,
    TOKENIZERS,
    choose_npz,
    fetch_tokenizer,
    first_of,
    needed_files,
    refused,
    unreachable,
)
from paligemma_jax.hub.http import Checksum, Meter, Progress, is_transient, status_of
from paligemma_jax.hub.kaggle import (
    kaggle_cached,
    kaggle_download,
    kaggle_folder,
    require_readable,
)

_HEX = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_WHOLE = ".whole"  # beside a directory of which everything is there


def download(location: Location, progress: Progress | None = None, refresh: bool = False) -> Path:
    """Path of a model's weights, and what lies beside them, in the cache of its hub.

    What is there is used without asking; `refresh` looks for something newer at Hugging Face and
    Kaggle. Of processes that start together, one downloads and the others wait. Raises
    CheckpointError; MissingExtraError where the hub's client is needed and not installed.
    """
    refresh = refresh and not isinstance(location, Web)
    found = None if refresh else cached(location)
    if found is not None:
        return found
    if isinstance(location, Kaggle):
        require_readable(location)
        with locked(kaggle_folder(location) / ".paligemma-jax.lock"):
            return (None if refresh else cached(location)) or kaggle_download(location, progress)
    if isinstance(location, HuggingFace):
        offline = [v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(v)]
        found = _hf_cached(location, tokenizer=False) if offline else None
        if found is not None:
            return found
        if offline:
            raise CheckpointError(
                f"{location} is not in the cache, and {offline[0]} is set. On a machine that "
                f"reaches the hub run: paligemma download {location}"
            )
        lock = _hf_cache() / ".locks" / _hf_folder(location).name / "paligemma-jax.lock"
    else:
        directory = _web_directory(location)
        lock = directory.with_name(f"{directory.name}.lock")
    with _shown(progress, str(location)) as tell:
        with locked(lock, lambda: tell("waiting for another download", 0, 0)):
            found = None if refresh else cached(location)
            if found is not None:
                return found
            if isinstance(location, HuggingFace):
                return _hf_download(location, tell)
            return _web_download(location, Meter(tell))


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def cached(location: Location) -> Path | None:
    """The same path if nothing has to be downloaded for it; asks no hub."""
    match location:
        case HuggingFace():
            return _hf_cached(location)
        case Kaggle():
            return kaggle_cached(location)
        case Web():
            directory = _web_directory(location)
            path = directory / _web_name(location) if _is_file(location) else directory
            return path if (directory / _WHOLE).exists() and path.exists() else None


def cached_locations(model: ModelInfo) -> list[Location]:
    """Where of the locations of a published model it has been downloaded from."""
    locations: list[Location] = []
    for repository in (model.repository, model.jax_repository):
        locations += [HuggingFace(repository, revision) for revision in model.revisions]
    if model.kaggle:
        locations.append(Kaggle(model.kaggle))
    if model.name in OPEN_COPIES:
        copy = find_location(OPEN_COPIES[model.name])
        locations += [copy] if copy else []
    return [location for location in locations if cached(location) is not None]


@contextlib.contextmanager
def _shown(progress: Progress | None, title: str) -> Iterator[Progress]:
    """`progress`, or a bar of its own on standard error where a person may be watching.

    HF_HUB_DISABLE_PROGRESS_BARS=1 shows none.
    """
    if progress is not None:
        yield progress
        return
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    if _is_on("HF_HUB_DISABLE_PROGRESS_BARS") or not watched:
        yield lambda name, done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit="B", unit_scale=True, file=sys.stderr) as bar:

        def update(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.set_postfix_str(name, refresh=False)

        yield update


def _hf_cached(location: HuggingFace, tokenizer: bool = True) -> Path | None:
    """Directory of the model's files if all that are needed are in the cache.

    Without `tokenizer`, one that other programs left without a tokenizer counts too.
    """
    folder = _hf_folder(location)
    commit = location.revision
    with contextlib.suppress(OSError):
        commit = (folder / "refs" / location.revision).read_text().strip()
    snapshot = folder / "snapshots" / commit
    try:
        names = {path.name for path in snapshot.iterdir() if path.exists()}
        whole = MANIFEST in names or bool(choose_npz([n for n in names if n not in MASK_CODECS]))
        if not whole and "config.json" in names and (not tokenizer or names & set(TOKENIZERS)):
            whole = SINGLE in names or set(_index_files(snapshot / INDEX)) <= names
    except (OSError, ValueError):
        return None
    return snapshot if commit and whole else None


def _index_files(index: Path) -> list[str]:
    """The files that an index of shards names; ValueError for another file."""
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError("not an index of shards") from e


def _hf_download(location: HuggingFace, progress: Progress) -> Path:
    token = _hf_token()
    commit, files = _hf_listing(location, token)
    folder = _hf_folder(location)
    blobs, snapshot = folder / "blobs", folder / "snapshots" / commit
    # Files of the same content are one blob.
    contents = {checksum.value: (name, size, checksum) for name, size, checksum in files}
    missing = {blob: file for blob, file in contents.items() if not (blobs / blob).exists()}
    parts = [blobs / f"{blob}.partial" for blob in missing]
    to_come = sum(size for _, size, _ in missing.values())
    http.require_space(folder, to_come - sum(p.stat().st_size for p in parts if p.exists()))
    meter = Meter(progress, sum(size for _, size, _ in contents.values()))
    meter.done = meter.total - to_come
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for blob, (name, size, checksum) in missing.items():
        quoted = urllib.parse.quote(name)
        url = f"{_hf_endpoint()}/{location.repository}/resolve/{commit}/{quoted}"
        try:
            http.fetch(url, blobs / blob, meter, headers=headers, checksum=checksum, size=size)
        except http.FetchError as e:
            raise refused(location, _hf_page(location), e, token is not None) from e
    for name, _, checksum in reversed(files):  # weights first: what says all is there comes last
        _link(snapshot / name, blobs / checksum.value)
    if commit != location.revision:  # last: what a branch names is whole
        reference = folder / "refs" / location.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        temporary = reference.with_name(f"{reference.name}.{os.getpid()}")
        temporary.write_text(commit)
        os.replace(temporary, reference)
    return snapshot


def _link(path: Path, blob: Path) -> None:
    """Makes `path` stand for `blob`, by a relative link where the system has links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        os.link(blob, path)


def _hf_listing(
    location: HuggingFace, token: str | None
) -> tuple[str, list[tuple[str, int, Checksum]]]:
    """The commit of a revision; name, size and checksum of the files in it that a model needs."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as e:
        raise MissingExtraError(f"Downloading {location} from Hugging Face", "hub") from e

    api = huggingface_hub.HfApi(endpoint=_hf_endpoint(), token=token or False)
    try:
        info = http.with_retries(
            lambda: api.model_info(
                location.repository, revision=location.revision, files_metadata=True
            ),
            is_transient,
        )
    except errors.RevisionNotFoundError as e:
        model = find_model(location.repository)
        there = f"There are {', '.join(model.revisions)}. " if model else ""
        raise CheckpointError(
            f"{location.repository} has no revision {location.revision}. {there}Leave it out for "
            "main."
        ) from e
    except Exception as e:
        if not status_of(e) and not is_transient(e):
            raise
        raise refused(location, _hf_page(location), e, token is not None) from e
    listed = {file.rfilename: file for file in info.siblings or []}
    files = []
    for name in needed_files(listed, f"{location} at Hugging Face"):
        if os.path.isabs(name) or ".." in Path(name).parts or "\\" in name:
            raise CheckpointError(
                f"{location} lists a file {name!r}, which would lie outside of its directory. Use "
                "another repository."
            )
        file = listed[name]
        checksum, size = Checksum("git", str(file.blob_id)), file.size
        if file.lfs is not None:
            checksum, size = Checksum("sha256", str(file.lfs.sha256)), file.lfs.size
        if not _HEX.fullmatch(checksum.value) or not _HEX.fullmatch(str(info.sha)):
            raise CheckpointError(
                f"{_hf_endpoint()} lists {location} without checksums. Set HF_ENDPOINT to a hub "
                "that gives them, or leave it unset."
            )
        files.append((name, size or 0, checksum))
    return str(info.sha), files


def _hf_cache() -> Path:
    """As the client finds it; read from the environment each time."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def _hf_folder(location: HuggingFace) -> Path:
    return _hf_cache() / f"models--{location.repository.replace('/', '--')}"


def _hf_endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _hf_page(location: HuggingFace) -> str:
    return f"{_hf_endpoint()}/{location.repository}"


def _hf_token() -> str | None:
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    return token.strip() if token else login_token()


def login_token() -> str | None:
    """The token that `hf auth login` left."""
    try:
        import huggingface_hub
    except ImportError:
        return None
    return huggingface_hub.get_token()


def _web_download(location: Web, meter: Meter) -> Path:
    """What lies at an address is taken to stay the same; tokenizer and mask codec come along."""
    directory = _web_directory(location)
    base = location.url.rstrip("/")
    is_file = _is_file(location)
    if is_file:
        base = base.rpartition("/")[0]
        first_of(base, ("paligemma_tokenizer.model", "tokenizer.model"), directory, meter)
        first_of(base, MASK_CODECS, directory, meter)
        if location.url.startswith(f"{STORAGE}/"):
            fetch_tokenizer(directory, meter)
        checksum = None if location.sha256 is None else Checksum("sha256", location.sha256)
        target = directory / _web_name(location)
        _required(location, location.url, target, meter, checksum)
    else:
        _required(location, f"{base}/config.json", directory / "config.json", meter)
        for name in SETTINGS[1:]:
            first_of(base, (name,), directory, meter)
        first_of(base, TOKENIZERS, directory, meter)
        names = [SINGLE]
        if first_of(base, (INDEX,), directory, meter):
            names = _shards(location, directory / INDEX)
        for name in names:
            _required(location, f"{base}/{name}", directory / name, meter)
    (directory / _WHOLE).touch()
    return directory / _web_name(location) if is_file else directory


def _shards(location: Web, index: Path) -> list[str]:
    try:
        names = _index_files(index)
        plain = all(n.endswith(".safetensors") and Path(n).name == n for n in names)
        if names and plain and not any("\\" in name for name in names):
            return names
    except (OSError, ValueError, AttributeError):
        pass
    index.unlink()
    raise CheckpointError(
        f"{location.url}/{INDEX} is not an index of shards, or names files outside of the "
        "directory. Save the model again: model.save_pretrained(directory)"
    )


def _required(
    location: Web, url: str, target: Path, meter: Meter, checksum: Checksum | None = None
) -> None:
    if target.exists():
        return
    try:
        http.fetch(url, target, meter, checksum=checksum)
    except http.FetchError as e:
        if not e.status:
            raise unreachable(location, urllib.parse.urlsplit(url).netloc, e) from e
        raise CheckpointError(
            f"{url} cannot be downloaded: the server says {e}. Expected the open address of an "
            "npz, or of a directory with config.json and safetensors. Download it with your "
            "account by other means, and pass the path."
        ) from e


def _is_file(location: Web) -> bool:
    path = urllib.parse.urlsplit(location.url).path
    if path.endswith(".npz"):
        return True
    if path.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".gguf", ".safetensors")):
        raise CheckpointError(
            f"{location.url} is not the address of a whole model. Expected that of an npz, or of "
            "the directory with config.json and safetensors. Try: "
            f"{location.url.rpartition('/')[0]}/"
        )
    return False


def _web_name(location: Web) -> str:
    """What the file is called here: without anything that could lead to another directory."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(location.url).path.rpartition("/")[2])
    return _plain(name).lstrip(".")


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _web_directory(location: Web) -> Path:
    """A directory of its own for each address; a published model's is called by its name."""
    key = hashlib.sha256(f"{location.url}#{location.sha256 or ''}".encode()).hexdigest()[:16]
    host = urllib.parse.urlsplit(location.url).hostname or ""
    last = Path(_web_name(location) or "model").stem
    for name, address in OPEN_COPIES.items():
        known = find_location(address)
        last = name if isinstance(known, Web) and known.url == location.url else last
    return user_cache() / "downloads" / f"{_plain(f'{host}-{last}')}-{key}"
