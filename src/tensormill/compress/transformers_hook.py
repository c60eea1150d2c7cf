"""Makes `transformers` load compressed checkpoints with low-bit linears, from `import tensormill` on.

transformers looks up the classes that read a quantized checkpoint in two tables of
`transformers.quantizers.auto`. `install` replaces their entries for the formats of `formats.registry` by ones
that recognise what the low-bit linear can compute (`transformers_quantizer`) and leave everything else to the
entries found there. AWQ and GPTQ checkpoints are left to them too where GPTQModel, with which transformers runs
these, is installed: its layers can be trained and chosen by argument, and an import mustn't take that away.
`preferring_low_bit` overrides this for `tensormill.load`.

Where transformers isn't imported yet, an import hook waits for it, so that `import tensormill` costs nothing; this
module imports no torch either.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

_TARGET = "transformers.quantizers.auto"
#: `quant_method`, and the package with which transformers runs it and which then goes first.
_METHODS: dict[str, str | None] = {"compressed-tensors": None, "awq": "gptqmodel", "gptq": "gptqmodel"}
_MARK = "_tensormill_entries"
_preferred: ContextVar[bool] = ContextVar("_preferred", default=False)


def install() -> None:
    """Registers the low-bit loader with transformers, now or as soon as transformers is imported.

    Calling it again does nothing.
    """
    module = sys.modules.get(_TARGET)
    if module is not None and hasattr(module, "AUTO_QUANTIZER_MAPPING"):
        _register(module)
    elif not any(isinstance(finder, _ImportHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportHook())


def uninstall() -> None:
    """Gives transformers its own entries back."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _ImportHook)]
    module = sys.modules.get(_TARGET)
    originals = getattr(module, _MARK, None)
    if module is not None and originals is not None:
        for method, (config, quantizer) in originals.items():
            module.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
            module.AUTO_QUANTIZER_MAPPING[method] = quantizer
        delattr(module, _MARK)


@contextlib.contextmanager
def preferring_low_bit() -> Iterator[None]:
    """Inside, every checkpoint that the low-bit linear can compute gets it, whatever is installed."""
    token = _preferred.set(True)
    try:
        yield
    finally:
        _preferred.reset(token)


class _ImportHook(importlib.abc.MetaPathFinder):
    """Lets the other finders find the quantizers' tables, and registers once they are imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        # The loader belongs to this one import, so its method can be replaced without touching other modules.
        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(module: ModuleType) -> None:
    if hasattr(module, _MARK):
        return
    configs = getattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING", {})
    quantizers = getattr(module, "AUTO_QUANTIZER_MAPPING", {})
    from tensormill.compress.transformers_quantizer import make_entries

    originals = {}
    for method, package in _METHODS.items():
        if method not in configs or method not in quantizers:
            continue
        originals[method] = configs[method], quantizers[method]
        configs[method], quantizers[method] = make_entries(
            method, *originals[method], partial(_ours_first, package)
        )
    setattr(module, _MARK, originals)


def _ours_first(package: str | None) -> bool:
    return _preferred.get() or package is None or importlib.util.find_spec(package) is None
