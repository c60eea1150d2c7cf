"""The folder of what need not be found out twice: a machine's measured ceilings, and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where it is (`TENSORMILL_CACHE`, else the user's cache folder)."""
    if (given := os.environ.get("TENSORMILL_CACHE")) is not None:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "tensormill"
