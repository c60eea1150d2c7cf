"""Number formats of compressed weights: the quantizer, and converters to the layouts other tools read.

`checkpoint_format` says what a checkpoint format is, `registry` lists them, and each has a module of its own.
"""

from tensormill.compress.formats.quantization import (
    QuantizedWeight,
    QuantSpec,
    fake_quantize,
    quantize_weight,
)

__all__ = ["QuantSpec", "QuantizedWeight", "fake_quantize", "quantize_weight"]
