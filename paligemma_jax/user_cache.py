"""Where this library keeps for a user what it can make or download again."""

import os
import sys
from pathlib import Path


def user_cache() -> Path:
    """Directory of this library in the user's cache; it need not exist."""
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        root = home / "Library" / "Caches"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return root / "paligemma-jax"
