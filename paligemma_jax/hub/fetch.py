"""From a source to files on disk, whichever hub it is."""

from pathlib import Path

from paligemma_jax.hub import huggingface, kaggle, web
from paligemma_jax.hub.catalogue import Published
from paligemma_jax.hub.meter import Progress
from paligemma_jax.hub.sources import OPEN_COPIES, HuggingFace, Kaggle, Source, Web, find_source


def fetch(source: Source, progress: Progress | None = None, refresh: bool = False) -> Path:
    """Path of a model's weights, and what lies beside them, in the cache of its hub.

    What is there is used without asking; `refresh` looks for something newer at
    Hugging Face and Kaggle. Of processes that
    start together, one downloads and the others wait. Raises CheckpointError; MissingExtraError
    where the hub's client is needed and not installed.
    """
    match source:
        case HuggingFace():
            return huggingface.fetch(source, progress, refresh)
        case Kaggle():
            return kaggle.fetch(source, progress, refresh)
        case Web():
            return web.fetch(source, progress)


def cached(source: Source) -> Path | None:
    """The same path if nothing has to be downloaded for it; asks no hub."""
    match source:
        case HuggingFace():
            return huggingface.cached(source)
        case Kaggle():
            return kaggle.cached(source)
        case Web():
            return web.cached(source)


def cached_sources(entry: Published) -> list[Source]:
    """Where of the places that have a published model it has been downloaded from."""
    places: list[Source] = []
    for repository in (entry.repository, entry.jax_repository):
        places += [HuggingFace(repository, revision) for revision in entry.revisions]
    if entry.kaggle:
        places.append(Kaggle(entry.kaggle))
    if entry.name in OPEN_COPIES:
        copy = find_source(OPEN_COPIES[entry.name])
        places += [copy] if copy else []
    return [source for source in places if cached(source) is not None]
