"""Decoding with a model that fits a device: prepared for it, with a static cache and one CUDA graph per step.

- `prepare_for_decoding` fuses what a decoder of Llama's kind computes in many small steps;
- `GreedyRunner` runs a batch greedily, prepared or through transformers' own forward, captured where it can be;
- `compare_decoding` times models side by side;
- `random_llama` makes a model of any size in seconds, for where none is at hand.
"""

from tensormill.models.decoding.greedy import GreedyRunner, greedy_tokens, stream_greedy
from tensormill.models.decoding.plain import PlainDecoder
from tensormill.models.decoding.prepared import PreparedDecoder, prepare_for_decoding, why_not_prepared
from tensormill.models.decoding.speed import DecodingSpeed, compare_decoding
from tensormill.models.decoding.synthetic import dense_copy, random_llama

__all__ = [
    "DecodingSpeed",
    "GreedyRunner",
    "PlainDecoder",
    "PreparedDecoder",
    "compare_decoding",
    "dense_copy",
    "greedy_tokens",
    "prepare_for_decoding",
    "random_llama",
    "stream_greedy",
    "why_not_prepared",
]
