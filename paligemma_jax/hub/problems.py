"""What is said when a hub does not give what was asked for."""

from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub.sources import HuggingFace, Kaggle, Source, open_copy


def gated(source: Source, page: str, credentials: bool) -> CheckpointError:
    """The hub wants to know who asks, and that the licence was accepted."""
    if isinstance(source, HuggingFace):
        hub, login = "Hugging Face", "run: hf auth login (or set HF_TOKEN to a token that may read)"
    else:
        hub = "Kaggle"
        login = (
            "set KAGGLE_API_TOKEN (or KAGGLE_USERNAME and KAGGLE_KEY), or call: kagglehub.login()"
        )
    if credentials:
        why = "the account that was used may not read it"
        fits = "An account that accepted the licence fits"
        then = (
            f"Open {page} with that account, accept the licence, then run this again. For another "
            f"account {login}"
        )
    else:
        why = "no account was named"
        fits = "Anybody who accepts the licence may have it"
        then = f"Open {page}, accept the licence, then {login}"
    copy = open_copy(source.repository) if isinstance(source, HuggingFace) else None
    without = f". Without an account, the same weights are at {copy}" if copy else ""
    return CheckpointError(f"{source} at {hub} is gated, and {why}. {fits}{without}. {then}")


def not_found(source: Source, page: str) -> CheckpointError:
    """The hub knows no such model, or hides it."""
    hub = "Kaggle" if isinstance(source, Kaggle) else "Hugging Face"
    return CheckpointError(
        f"{source} is neither a path here nor a model at {hub}, or it is a private one. A path, a "
        f"published name such as paligemma2-3b-mix-448, or what {page} shows fits. See: paligemma "
        "models"
    )


def no_such_revision(source: HuggingFace, revisions: str) -> CheckpointError:
    """The repository is there, the branch is not."""
    return CheckpointError(
        f"{source.repository} has no revision {source.revision}. {revisions} Leave it out for main."
    )


def offline(source: Source, why: str) -> CheckpointError:
    """It is not in the cache, and must not or cannot be asked for."""
    return CheckpointError(
        f"{source} is not in the cache, and {why}. A machine that reaches the hub, or a cache that "
        f"was filled before, fits. Run there: paligemma download {source}"
    )


def unreachable(source: Source, host: str, why: object) -> CheckpointError:
    """The hub does not answer as it should, again and again."""
    return CheckpointError(
        f"{source} cannot be downloaded from {host}: {why}. What has arrived is kept, and is not "
        f"asked for again. Check the connection, then run: paligemma download {source}"
    )


def wrong_checksum(name: str, source: str, expected: str, found: str) -> CheckpointError:
    """What arrived, twice, is not what the hub says it has."""
    return CheckpointError(
        f"{name} of {source} was damaged on its way, twice: its digest is {found[:16]}..., that of "
        f"the hub {expected[:16]}.... Nothing of it was kept. Try again, or from another network"
    )
