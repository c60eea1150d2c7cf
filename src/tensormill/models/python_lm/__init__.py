"""The built-in language model `builtin:python-lm`: a small Llama that writes Python.

The folder `weights` holds a checkpoint as `transformers` reads it (configuration, tokenizer, safetensors) and
the model card. It was written by `python -m tensormill.models.python_lm.train`.
"""

from __future__ import annotations

from pathlib import Path

from tensormill.errors import CheckpointError

__all__ = ["NAME", "path", "resolve"]

NAME = "builtin:python-lm"


def path() -> Path:
    """Folder of the model's checkpoint.

    Raises:
        CheckpointError: this installation holds no weights.
    """
    folder = Path(__file__).resolve().parent / "weights"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"given {NAME}, expected its weights in {folder}; reinstall the package, or train the model with "
            "python -m tensormill.models.python_lm.train"
        )
    return folder


def resolve(name: str | Path) -> Path:
    """Folder of a model given by folder or by the name `builtin:python-lm`.

    Args:
        name: a folder, or the built-in model's name.

    Raises:
        CheckpointError: an unknown built-in model, or one whose weights are missing.
    """
    if isinstance(name, str) and name.startswith("builtin:"):
        if name != NAME:
            raise CheckpointError(f"given {name}, expected {NAME}, which is the only built-in model")
        return path()
    return Path(name)
