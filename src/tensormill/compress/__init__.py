"""Model in, smaller or faster model out: calibration, recipes, a file per method, checkpoints, evaluation.

`compress(model, ...)` is the whole job; the pieces are in the modules of this package.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensormill.compress.pipeline import compress as compress

__all__ = ["compress"]


def __getattr__(name: str) -> Any:
    if name == "compress":
        from tensormill.compress.pipeline import compress

        return compress
    raise AttributeError(f"module 'tensormill.compress' has no attribute {name!r}")
