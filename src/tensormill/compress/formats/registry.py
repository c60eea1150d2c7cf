"""The checkpoint formats by name, and the one that a `quantization_config` means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensormill.compress.formats.autoawq import AUTOAWQ
from tensormill.compress.formats.autogptq import GPTQ_V1, GPTQ_V2, version_of
from tensormill.compress.formats.checkpoint_format import CheckpointFormat
from tensormill.compress.formats.compressed_tensors import COMPRESSED_TENSORS
from tensormill.errors import CheckpointError, InvalidArgument

DEFAULT = COMPRESSED_TENSORS.name

FORMATS: dict[str, CheckpointFormat] = {
    found.name: found for found in (COMPRESSED_TENSORS, AUTOAWQ, GPTQ_V1, GPTQ_V2)
}

#: Every `quant_method` that can be read.
METHODS = tuple(dict.fromkeys(found.method for found in FORMATS.values()))


def format_named(name: str) -> CheckpointFormat:
    """The format that the user calls `name`.

    Raises:
        InvalidArgument: there is none of that name.

    >>> format_named("awq").method
    'awq'
    """
    if name not in FORMATS:
        raise InvalidArgument(f"given format {name!r}, expected one of {list(FORMATS)}")
    return FORMATS[name]


def format_of(config: Mapping[str, Any]) -> CheckpointFormat:
    """The format of a checkpoint with this `quantization_config`.

    Raises:
        CheckpointError: none of these formats.

    >>> format_of({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}).name
    'gptq_v2'
    """
    method = config.get("quant_method")
    if method == GPTQ_V1.method:
        return version_of(config)
    for found in FORMATS.values():
        if found.method == method:
            return found
    raise CheckpointError(f"the checkpoint is quantized with {method!r}, expected one of {list(METHODS)}")
