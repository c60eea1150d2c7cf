"""Efficient-ML methods that run, on one operator layer: see README.md for where to begin.

Importing this package is cheap: torch and everything above it is imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tensormill.compress.transformers_hook import install as _install_transformers_hook

if TYPE_CHECKING:
    from tensormill.compress.checkpoint import load as load
    from tensormill.compress.checkpoint import open_model as open_model
    from tensormill.compress.evaluate import evaluate as evaluate
    from tensormill.operator import use_implementation as use_implementation
    from tensormill.papers.reproduce import reproduce as reproduce

__version__ = "0.1.0"

_EXPORTS = {
    "load": "tensormill.compress.checkpoint",
    "open_model": "tensormill.compress.checkpoint",
    "evaluate": "tensormill.compress.evaluate",
    "use_implementation": "tensormill.operator",
    "reproduce": "tensormill.papers.reproduce",
}
__all__ = ["__version__", *_EXPORTS]

_install_transformers_hook()


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'tensormill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
