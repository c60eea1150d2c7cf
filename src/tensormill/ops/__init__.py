"""The operators, a folder each; importing this package finds and registers all of them.

`tensormill.ops.<name>` is the operator's public function; `OPERATORS[name]` is the `Operator` itself.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from tensormill.operator import OPERATORS, Operator, use_implementation

__all__ = ["OPERATORS", "Operator", "use_implementation"]

for _folder in pkgutil.iter_modules(__path__):
    if _folder.ispkg:
        _module = importlib.import_module(f"{__name__}.{_folder.name}")
        globals()[_folder.name] = getattr(_module, _folder.name)
        __all__.append(_folder.name)


def __getattr__(name: str) -> Callable[..., Any]:
    raise AttributeError(f"tensormill has no operator {name!r}; it has {', '.join(sorted(OPERATORS))}")
