"""Text and data sets: what every machine with Python has, what is generated, and where optional data lies."""

from __future__ import annotations

import os
from pathlib import Path

from tensormill.errors import DataError

__all__ = ["real_data_dir"]


def real_data_dir() -> Path | None:
    """Folder of optional real weights and data sets, or None where there is none.

    The environment variable TENSORMILL_DATA wins; without it, a folder `shared/data` beside the checkout
    that holds this package is taken where it exists. Nothing in the package depends on it: tests and
    measurements that want such data skip, and say so, when this returns None.

    Returns:
        The folder, or None.

    Raises:
        DataError: TENSORMILL_DATA is set to something that is not a folder.
    """
    named = os.environ.get("TENSORMILL_DATA")
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"given TENSORMILL_DATA={named!r}, expected a folder; create it or unset the variable"
            )
        return folder.resolve()
    # src/tensormill/data/__init__.py -> the checkout is three folders above the package's parent
    checkout = Path(__file__).resolve().parents[3]
    beside = checkout.parent / "shared" / "data"
    return beside if beside.is_dir() else None
