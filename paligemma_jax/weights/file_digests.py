"""sha256 of a directory's files in SHA256SUMS, as the sha256sum program reads and writes it."""

import re
from pathlib import Path

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.manifest import digest_files, file_sha256

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_digests(directory: Path) -> None:
    """Writes the digests of all files that are there."""
    lines = [f"{digest.sha256}  {name}\n" for name, digest in digest_files(directory).items()]
    (directory / SUMS).write_text("".join(lines))


def find_changed(directory: Path) -> list[str]:
    """A line for each file that is missing or changed; CheckpointError for a damaged list."""
    found = [_LINE.fullmatch(line) for line in (directory / SUMS).read_text().splitlines()]
    named = {line[2]: line[1] for line in found if line is not None}
    if not named or None in found or any(Path(n).is_absolute() or ".." in n for n in named):
        raise CheckpointError(
            f"{directory / SUMS} is no list of digests. One as sha256sum writes it fits. Write the "
            "directory again, or remove the list."
        )
    problems = []
    for name, sha256 in named.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif file_sha256(path) != sha256:
            problems.append(f"{name} was changed (sha256 differs)")
    return problems
