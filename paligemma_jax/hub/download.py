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
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from paligemma_jax.errors import CheckpointError, MissingExtraError
from paligemma_jax.filesystem import locked, user_cache
from paligemma_jax.hub import catalogue, files, http, kaggle
from paligemma_jax.hub.catalogue import HuggingFace, Kaggle, Location, ModelInfo, Web
from paligemma_jax.hub.http import Checksum, Meter, Progress

_HEX = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_WHOLE = ".whole"  # in a directory of which everything is there


def download(location: Location, progress: Progress | None = None, refresh: bool = False) -> Path:
    """Path of a model's weights, and what lies beside them, in the cache of its hub.

    What is there is used without asking; `refresh` looks for something newer at Hugging Face and
    Kaggle. Of processes that start together, one downloads and the others wait. Raises
    CheckpointError; MissingExtraError where the hub's client is needed and not installed.
    """
    refresh = refresh and not isinstance(location, Web)
    if not refresh and (found := cached(location)):
        return found
    match location:
        case HuggingFace():
            offline = [v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(v)]
            if offline and (found := _hf_cached(location, tokenizer=False)):
                return found
            if offline:
                raise CheckpointError(
                    f"{location} is not in the cache, and {offline[0]} is set. On a machine that "
                    f"reaches the hub run: paligemma download {location}"
                )
            folder = _hf_folder(location)
            folder = folder.parent / ".locks" / folder.name
        case Kaggle():
            folder = kaggle.folder(location)
        case Web():
            folder = _web_directory(location)
    with contextlib.ExitStack() as stack:
        report = progress
        if progress is None and not isinstance(location, Kaggle):  # whose client has its own
            report = stack.enter_context(_bar(str(location)))
        tell = report or (lambda name, done, total: None)
        waiting = lambda: tell("waiting for another download", 0, 0)  # noqa: E731
        stack.enter_context(locked(folder / ".paligemma-jax.lock", waiting))
        if not refresh and (found := cached(location)):
            return found
        match location:
            case HuggingFace():
                return _hf_download(location, tell)
            case Web():
                return _web_download(location, Meter(tell))
            case Kaggle():
                path = kaggle.download(location, progress)
                if path.suffix == ".npz":  # Kaggle has the weights alone
                    _get_tokenizer(path.parent, Meter(tell))
                return path


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def cached(location: Location) -> Path | None:
    """The same path if nothing has to be downloaded for it; asks no hub."""
    match location:
        case HuggingFace():
            return _hf_cached(location)
        case Kaggle():
            return kaggle.cached(location)
        case Web():
            path = _web_path(location)
            is_whole = (_web_directory(location) / _WHOLE).exists() and path.exists()
            return path if is_whole else None


def cached_locations(model: ModelInfo) -> list[Location]:
    """Where of the locations of a published model it has been downloaded from."""
    repositories = (model.repository, model.jax_repository)
    locations: list[Location | None] = [
        *(HuggingFace(name, revision) for name in repositories for revision in model.revisions),
        Kaggle(model.kaggle) if model.kaggle else None,
        catalogue.find_location(catalogue.OPEN_COPIES.get(model.name, "")),
    ]
    return [location for location in locations if location and cached(location)]


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """A bar on standard error where a person may be watching.

    HF_HUB_DISABLE_PROGRESS_BARS=1 shows none.
    """
    from tqdm import tqdm

    hidden = _is_on("HF_HUB_DISABLE_PROGRESS_BARS")
    hidden = hidden or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
    with tqdm(desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=hidden) as bar:

        def update(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.set_postfix_str(name, refresh=False)

        yield update


def _hf_folder(location: HuggingFace) -> Path:
    """In the client's cache, which it finds by the same variables."""
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    cache = next(filter(None, map(os.environ.get, names)), os.path.join(home, "hub"))
    return Path(cache).expanduser() / f"models--{location.repository.replace('/', '--')}"


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
        whole = files.MANIFEST in names or bool(files.choose_npz(names))
        if (
            not whole
            and "config.json" in names
            and (not tokenizer or names & set(files.TOKENIZERS))
        ):
            whole = files.SINGLE in names or set(_index_files(snapshot / files.INDEX)) <= names
    except (OSError, ValueError):
        return None
    return snapshot if commit and whole else None


def _index_files(index: Path) -> list[str]:
    """The files that an index of shards names; ValueError for another file."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if names and all(re.fullmatch(r"[^/\\]+\.safetensors", name) for name in names):
            return names
    except (KeyError, TypeError, AttributeError):
        pass
    raise ValueError("not an index of shards")


def _hf_download(location: HuggingFace, progress: Progress) -> Path:
    try:
        import huggingface_hub
    except ImportError as e:
        raise MissingExtraError(f"Downloading {location} from Hugging Face", "hub") from e

    token = huggingface_hub.get_token()  # of HF_TOKEN or `hf auth login`
    endpoint = location.page.removesuffix(f"/{location.repository}")
    client = huggingface_hub.HfApi(endpoint=endpoint, token=token or False)
    try:
        info = http.with_retries(
            lambda: client.model_info(
                location.repository, revision=location.revision, files_metadata=True
            ),
            http.is_transient,
        )
    except huggingface_hub.errors.RevisionNotFoundError as e:
        model = catalogue.find_model(location.repository)
        there = f"There are {', '.join(model.revisions)}. " if model else ""
        raise CheckpointError(
            f"{location.repository} has no revision {location.revision}. {there}Leave it out for "
            "main."
        ) from e
    except Exception as e:
        raise files.download_error(location, e, token is not None) from e
    commit, listed = str(info.sha), {file.rfilename: file for file in info.siblings or []}
    checksums: dict[str, Checksum] = {}
    sizes: dict[str, int] = {}  # by checksum: files of the same content are one blob
    for name in files.needed_files(listed, f"{location} at Hugging Face"):
        file, lfs = listed[name], listed[name].lfs
        checksum = Checksum("git", str(file.blob_id))
        if lfs is not None:
            checksum = Checksum("sha256", str(lfs.sha256))
        leads_outside = os.path.isabs(name) or ".." in Path(name).parts or "\\" in name
        if leads_outside or not (_HEX.fullmatch(checksum.value) and _HEX.fullmatch(commit)):
            raise CheckpointError(
                f"{endpoint} lists the file {name!r} of {location} without checksum, or outside "
                "of its directory. Use another repository, or leave HF_ENDPOINT unset."
            )
        checksums[name] = checksum
        sizes[checksum.value] = (lfs.size if lfs else file.size) or 0
    folder = _hf_folder(location)
    snapshot = folder / "snapshots" / commit
    blobs = {name: folder / "blobs" / checksum.value for name, checksum in checksums.items()}
    missing = {path: name for name, path in blobs.items() if not path.exists()}
    to_come = sum(sizes[path.name] for path in missing)
    parts = [path.with_name(f"{path.name}.partial") for path in missing]
    http.require_space(folder, to_come - sum(p.stat().st_size for p in parts if p.exists()))
    meter = Meter(progress, sum(sizes.values()), sum(sizes.values()) - to_come)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for path, name in missing.items():
        url = f"{location.page}/resolve/{commit}/{urllib.parse.quote(name)}"
        try:
            http.fetch(url, path, meter, headers, checksums[name], sizes[path.name])
        except http.FetchError as e:
            raise files.download_error(location, e, token is not None) from e
    for name in reversed(checksums):  # weights first: what says all is there comes last
        _link(snapshot / name, blobs[name])
    if commit != location.revision:  # last: what a branch names is whole
        reference = folder / "refs" / location.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        temporary = reference.with_name(f"{reference.name}.{os.getpid()}")
        temporary.write_text(commit)
        os.replace(temporary, reference)
    return snapshot


def _link(path: Path, blob: Path) -> None:
    """Makes `path` stand for `blob`, by a relative link where the system has links."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        os.link(blob, path)


def _web_download(location: Web, meter: Meter) -> Path:
    """What lies at an address is taken to stay the same; tokenizer and mask codec come along."""
    directory, path = _web_directory(location), _web_path(location)
    base = location.url.rstrip("/")
    if path != directory:
        base = base.rpartition("/")[0]
        _get_first(base, files.TOKENIZERS[1::-1], directory, meter)
        _get_first(base, files.MASK_CODECS, directory, meter)
        if base.startswith(f"{catalogue.STORAGE}/"):
            _get_tokenizer(directory, meter)
        checksum = Checksum("sha256", location.sha256) if location.sha256 else None
        _get(location, location.url, path, meter, checksum)
    else:
        _get(location, f"{base}/config.json", directory / "config.json", meter)
        for name in files.SETTINGS[1:]:
            _get_first(base, (name,), directory, meter)
        _get_first(base, files.TOKENIZERS, directory, meter)
        names = [files.SINGLE]
        if _get_first(base, (files.INDEX,), directory, meter):
            try:
                names = _index_files(directory / files.INDEX)
            except ValueError as e:
                (directory / files.INDEX).unlink()
                raise CheckpointError(
                    f"{base}/{files.INDEX} is not an index of shards, or names files outside of "
                    "the directory. Save the model again: model.save_pretrained(directory)"
                ) from e
        for name in names:
            _get(location, f"{base}/{name}", directory / name, meter)
    (directory / _WHOLE).touch()
    return path


def _get(
    location: Web, url: str, target: Path, meter: Meter, checksum: Checksum | None = None
) -> None:
    try:
        if not target.exists():
            http.fetch(url, target, meter, checksum=checksum)
    except http.FetchError as e:
        raise files.download_error(location, e) from e


def _get_first(base: str, names: Sequence[str], directory: Path, meter: Meter) -> bool:
    """Whether one of the files is there now; a server that has none is no error."""
    for name in names:
        try:
            if not (directory / name).exists():
                http.fetch(f"{base}/{name}", directory / name, meter)
            return True
        except http.FetchError as e:
            if e.damaged:
                raise files.download_error(Web(f"{base}/{name}"), e) from e
            # Otherwise the weights themselves will say so, or their host is another.
    return False


def _get_tokenizer(directory: Path, meter: Meter) -> None:
    """That of all published checkpoints, where none is there; it has been closed at times."""
    if not any((directory / name).exists() for name in files.TOKENIZERS):
        base = f"{catalogue.STORAGE}/big_vision"
        _get_first(base, ("paligemma_tokenizer.model",), directory, meter)


def _web_path(location: Web) -> Path:
    """Of an npz, or the directory; raises CheckpointError for other files."""
    name = PurePosixPath(urllib.parse.urlsplit(location.url).path)
    others = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".gguf", ".safetensors")
    if name.suffix in others:
        raise CheckpointError(
            f"{location.url} is not the address of a whole model. Expected that of an npz, or of "
            "the directory with config.json and safetensors. Try: "
            f"{location.url.rpartition('/')[0]}/"
        )
    directory = _web_directory(location)
    return directory / _plain(name.name) if name.suffix == ".npz" else directory


def _plain(name: str) -> str:
    """A file name without anything that could lead to another directory."""
    return re.sub(r"[^\w.-]", "_", urllib.parse.unquote(name)).lstrip(".")


def _web_directory(location: Web) -> Path:
    """A directory of its own for each address; a published model's is called by its name."""
    url = urllib.parse.urlsplit(location.url)
    key = hashlib.sha256(f"{location.url}#{location.sha256 or ''}".encode()).hexdigest()[:16]
    open_copies = {
        catalogue.find_location(address): name for name, address in catalogue.OPEN_COPIES.items()
    }
    stem = Path(_plain(PurePosixPath(url.path).name)).stem or "model"
    name = open_copies.get(Web(location.url), stem)
    return user_cache() / "downloads" / f"{_plain(f'{url.hostname}-{name}')}-{key}"
