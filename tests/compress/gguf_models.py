"""A tiny random Llama with a byte-level vocabulary, written as a GGUF file by the package gguf's own writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

CHARACTERS = [chr(code) for code in range(33, 127)] + [
    "\u0120",
    "\u010a",
]  # with space and line end, as GPT-2 writes
MERGES = ["w o", "wo r", "wor d", "\u0120 word", *(f"word {digit}" for digit in range(10))]


def write_gguf(
    path: Path,
    *,
    kind: str = "Q4_1",
    architecture: str = "llama",
    vocabulary: bool = True,
    blocks: int = 2,
    leave_out: str = "",
    spoil: str = "",
    more: Any = None,
) -> Path:
    """Two blocks of width 64; matrices in the blocks of type `kind`, everything else float32.

    Args:
        path: The file.
        kind: A type of GGUF: "Q4_1", "Q8_0", "F16" or "F32".
        architecture: What the file calls itself.
        vocabulary: Whether there is a tokenizer.
        blocks: What the metadata says; there are two.
        leave_out: A tensor that is not written.
        spoil: A tensor that gets a NaN.
        more: Called with the writer, to add metadata.
    """
    import gguf

    quantization = gguf.GGMLQuantizationType[kind]
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("Tiny")
    writer.add_block_count(blocks)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(128)
    if vocabulary:
        tokens = ["<unk>", "</s>", *CHARACTERS, *(merge.replace(" ", "") for merge in MERGES)]
        tokens += [f"<unused{i}>" for i in range(128 - len(tokens))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * 126)
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(0)
    if more is not None:
        more(writer)

    def add(name: str, *shape: int) -> None:
        values = (draw.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        if name == spoil:
            values.flat[3] = np.nan
        if name == leave_out:
            return
        if name.startswith("blk.") and len(shape) == 2 and kind != "F32":
            writer.add_tensor(name, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", 128, 64)
    add("output_norm.weight", 64)
    add("output.weight", 128, 64)
    for block in range(2):
        for part, shape in {
            "attn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64),
            "ffn_norm": (64,), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96),
        }.items():  # fmt: skip
            add(f"blk.{block}.{part}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
