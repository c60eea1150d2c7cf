"""Write the trained model as `transformers` reads it: at most eight flat files, none over 16 MiB.

`export_model` writes configuration, tokenizer, weights in bfloat16 and the record of the training;
`finalize` adds what follows from those files alone: the generation settings and the model card.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import CheckpointError
from tensormill.models.python_lm.architecture import LlamaShape

__all__ = ["SHARD_BYTES", "export_model", "finalize", "shard"]

SHARD_BYTES = 15 * 2**20


def shard(weights: Mapping[str, Tensor], limit: int = SHARD_BYTES) -> list[dict[str, Tensor]]:
    """Divide tensors, in their order, into the fewest parts of about equal size that stay under a limit.

    Args:
        weights: tensors by name.
        limit: bytes.

    Raises:
        CheckpointError: one tensor alone is over the limit.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in weights.items()}
    for name, size in sizes.items():
        if size > limit:
            raise CheckpointError(f"given {name} of {size} bytes, expected at most {limit} bytes a shard")
    count = max(1, math.ceil(sum(sizes.values()) / limit))
    while True:
        target = sum(sizes.values()) / count
        parts: list[dict[str, Tensor]] = [{}]
        filled = done = 0
        for name, tensor in weights.items():
            past_share = done + sizes[name] / 2 > target * len(parts)
            if parts[-1] and (filled + sizes[name] > limit or (past_share and len(parts) < count)):
                parts.append({})
                filled = 0
            parts[-1][name] = tensor
            filled += sizes[name]
            done += sizes[name]
        if len(parts) <= count:
            return parts
        count += 1


def _write(folder: Path, name: str, content: bytes) -> None:
    partial = folder / f".{name}.partial"
    partial.write_bytes(content)
    os.replace(partial, folder / name)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def export_model(
    weights: Mapping[str, Tensor],
    shape: LlamaShape,
    tokenizer: Path,
    out: Path,
    record: Mapping[str, Any],
    *,
    end_of_text: str,
) -> dict[str, int]:
    """Write the checkpoint; each file as a whole or not at all.

    Args:
        weights: tensors by the names `LlamaForCausalLM` gives them; stored in bfloat16.
        shape: sizes of the model.
        tokenizer: file of the `tokenizers` library.
        out: folder, created where missing.
        record: what `training.json` holds.
        end_of_text: the token of id 0, which begins and ends documents.

    Returns:
        {file name: bytes}.
    """
    from safetensors.torch import save

    out.mkdir(parents=True, exist_ok=True)
    stored = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()
    }
    parts = shard(stored)
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for stale in out.glob("model-*.safetensors"):
        if stale.name not in names:
            stale.unlink()
    for name, part in zip(names, parts, strict=True):
        _write(out, name, save(part, metadata={"format": "pt"}))
    total = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    index = {
        "metadata": {"total_size": total, "total_parameters": sum(t.numel() for t in stored.values())},
        "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part},
    }
    _write(out, "model.safetensors.index.json", _json(index))
    _write(out, "config.json", _json(shape.config(end_of_text=0)))
    _write(out, "tokenizer.json", tokenizer.read_bytes())
    _write(
        out,
        "tokenizer_config.json",
        _json(
            {
                "add_bos_token": False,
                "add_eos_token": False,
                "added_tokens_decoder": {
                    "0": {
                        "content": end_of_text,
                        "lstrip": False,
                        "normalized": False,
                        "rstrip": False,
                        "single_word": False,
                        "special": True,
                    }
                },
                "bos_token": end_of_text,
                "clean_up_tokenization_spaces": False,
                "eos_token": end_of_text,
                "model_input_names": ["input_ids", "attention_mask"],
                "model_max_length": shape.context,
                "pad_token": end_of_text,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        ),
    )
    _write(out, "training.json", _json(record))
    return {file.name: file.stat().st_size for file in sorted(out.iterdir())}


def _sessions(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Records of all trainings that made the model, oldest first."""
    return [*record.get("earlier_sessions", []), record]


def _validations(record: Mapping[str, Any]) -> list[list[tuple[float, float]]]:
    """For each session (million tokens since the very beginning, validation bits per byte)."""
    before = 0.0
    curves = []
    for session in _sessions(record):
        curves.append(
            [
                (before + entry["tokens"] / 1e6, entry["validation"])
                for entry in session["curve"]
                if "validation" in entry
            ]
        )
        before += session["training"]["tokens"] / 1e6
    return curves


def _curve_svg(record: Mapping[str, Any]) -> str:
    """Validation bits per byte against training tokens as a small self-contained picture."""
    curves = _validations(record)
    points = [point for curve in curves for point in curve]
    if len(points) < 2:
        return ""
    width, height, left, top = 640, 280, 56, 16
    right, bottom = width - 16, height - 40
    largest = max(x for x, _ in points)
    low = math.floor(20 * min(y for _, y in points)) / 20
    high = math.ceil(20 * max(y for _, y in points)) / 20

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * x / largest,
            bottom - (bottom - top) * (y - low) / max(high - low, 1e-9),
        )

    pieces = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i in range(5):
        y = low + (high - low) * i / 4
        _, at = place(0, y)
        pieces.append(f'<line x1="{left}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="#ddd"/>')
        pieces.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.2f}</text>')
        x = largest * i / 4
        at, _ = place(x, low)
        pieces.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{x:.0f}</text>')
    for curve in curves:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        pieces.append(f'<polyline points="{path}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    pieces.append(
        f'<text x="{(left + right) / 2}" y="{height - 6}" text-anchor="middle">'
        "million training tokens; vertical: validation bits per byte</text></svg>"
    )
    return "\n".join(pieces) + "\n"


def _session_text(session: Mapping[str, Any], number: int, count: int) -> tuple[str, str]:
    """A paragraph on one training session and one on its data."""
    corpus, training, settings = session["corpus"], session["training"], session["settings"]
    begin = "" if count == 1 else f"Session {number}: "
    start = (
        "from random weights"
        if number == 1
        else "from the weights of the session before, with a new schedule"
    )
    trained = f"""{begin}{training["seconds"]:.0f} s on one {session["device"]} (torch {session["versions"]["torch"]}, \
{session["date"]}) {start}: {training["steps"]:,} steps,
{training["tokens"] / 1e6:,.0f} M tokens, {training["epochs"]:.1f} epochs, \
{training["tokens_per_second"] / 1e6:.2f} M tokens/s. Muon (learning rate {settings["muon_lr"]}, weight decay
{settings["weight_decay"]}) for the matrices of the blocks, AdamW ({settings["adamw_lr"]}) for embeddings and norms, cosine
schedule by the clock, {settings["batch_tokens"]:,} tokens a step in windows of {settings["curriculum_text"]},
bfloat16 autocast, gradient norm clipped at 1, seed {settings["seed"]}."""
    if "heldout" in session:
        trained += f" Held-out text afterwards: {session['heldout']['bits_per_byte']:.4f} bits per byte."
    dropped = ", ".join(f"{files:,} {reason}" for reason, files in corpus["dropped"].items())
    packages = sorted(corpus["packages"].items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in packages[:40])
    extra = ""
    if corpus.get("extra_files"):
        extra = (
            f"{corpus['extra_files']:,} of the files, {corpus['extra_bytes'] / 1e6:.1f} MB, were added to those of the "
            f"machine from released packages and count {corpus['extra_weight']} times. "
        )
    weight = corpus["stdlib_weight"]
    times = f", which count {weight} times" if weight > 1 else ""
    sources = f"""{begin}{corpus["training_files"]:,} files, {corpus["training_bytes"] / 1e6:.1f} MB, \
{corpus["unique_tokens"] / 1e6:.1f} M tokens after cleaning, among them
{corpus["stdlib_bytes"] / 1e6:.1f} MB of the standard library itself{times}. {extra}Dropped files: {dropped}.
By package: {listed}{f", and {len(packages) - 40} others" if len(packages) > 40 else ""}."""
    return trained, sources


def _card(record: Mapping[str, Any], config: Mapping[str, Any], files: Mapping[str, int]) -> str:
    """The model card, every figure from the record."""
    heldout = record["heldout"]
    baselines = record.get("baselines") or {}
    rows = [("this model (weights in bfloat16)", heldout["bits_per_byte"])]
    if "ngram" in baselines:
        gram = baselines["ngram"]
        rows.append(
            (
                f"{gram['order']}-gram model over the same tokens ({gram['smoothing']}, "
                f"{gram['training_tokens'] / 1e6:.0f} M tokens of the same training sequence)",
                gram["bits_per_byte"],
            )
        )
    if "xz" in baselines:
        rows.append((f"xz, preset {baselines['xz']['preset']}", baselines["xz"]["bits_per_byte"]))
    sessions = _sessions(record)
    texts = [_session_text(session, number, len(sessions)) for number, session in enumerate(sessions, 1)]
    trained = "\n\n".join(training for training, _ in texts)
    sources = "\n\n".join(source for _, source in texts)
    total = sum(session["training"]["tokens"] for session in sessions)
    curve = "\n".join(
        f"| {number} | {tokens:.0f} | {value:.4f} |"
        for number, points in enumerate(_validations(record), 1)
        for tokens, value in points[:: max(1, len(points) // 8)]
    )
    weight_bytes = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in rows)
    picture = "![Validation bits per byte during training](curve.svg)\n" if "curve.svg" in files else ""
    return f"""---
license: apache-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
---
# python-lm

A small language model that writes Python: {record["parameters"] / 1e6:.2f} M parameters in the Llama architecture,
{weight_bytes / 1e6:.1f} MB in bfloat16. It exists so that methods which make models smaller and faster can be
tried, tested and measured anywhere, with no download. It completes code recognisably; it does not write
programs one should run.

## Use

```python
import tensormill
from tensormill.models import python_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(python_lm.path())
tokenizer = AutoTokenizer.from_pretrained(python_lm.path())
inputs = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

## Architecture

{config["num_hidden_layers"]} layers of width {config["hidden_size"]}, {config["num_attention_heads"]} query heads and \
{config["num_key_value_heads"]} key-value heads of {config["head_dim"]}, MLP width {config["intermediate_size"]},
context {config["max_position_embeddings"]}, tied embeddings. Byte-level BPE tokenizer with {config["vocab_size"]} tokens; \
digits stand alone, a line end and the
indentation after it are one token; {heldout["bytes_per_token"]:.2f} bytes a token on the held-out text. Every text
survives encoding and decoding unchanged. No token is added at the beginning; `<|endoftext|>` separates documents.

## Evaluation

Held out were {len(heldout["modules"])} modules of the standard library ({", ".join(heldout["modules"])}),
{heldout["bytes"]:,} bytes, of Python {heldout["python"]} (SHA-256 of the joined text `{heldout["sha256"][:16]}...`). They are
joined with blank lines, tokenized once, and cut into disjoint windows of {heldout["window"]} tokens; each window is
predicted from its own tokens alone. {heldout["windows"]} windows, {heldout["scored_tokens"]:,} predicted tokens: perplexity \
{heldout["perplexity"]:.3f}.

| | bits per byte |
|---|---|
{table}

The baselines see the whole text as one sequence, without windows. The figures belong to this text: other Python
versions have slightly different modules.

## Training

`python -m tensormill.models.python_lm.train`, {total / 1e6:,.0f} M tokens in all.

{trained}

| session | M tokens | validation bits per byte |
|---|---|---|
{curve}

{picture}
Validation files are a random few of the corpus, and each session has its own; while windows are shorter than the
context, the model is validated on positions it has not been trained for yet.

## Data and licences

The model learned from Python files that were installed on the training machine.

{sources}

Files named like a held-out module or its tests, and files that share more than a trace of five-line runs with the
held-out text, were dropped before training.

The standard library is under the Python Software Foundation License; the packages are open-source software whose
authors chose permissive licences for the most part (Apache-2.0, MIT, BSD), each package its own. None of their text is
distributed here; these are weights learned from it. A model of this size can still reproduce short passages
that occur often, licence headers for example. The weights are distributed under Apache-2.0 with the library.
"""


def finalize(folder: Path) -> None:
    """Add `generation_config.json`, the curve and the model card to an exported folder.

    Args:
        folder: what `export_model` wrote.

    Raises:
        CheckpointError: the folder holds no finished training.
    """
    try:
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"given {folder}, expected a folder that the training script wrote ({error.__class__.__name__})"
        ) from error
    if "heldout" not in record:
        raise CheckpointError(f"given {folder}, expected a finished training; its record has no evaluation")
    _write(
        folder,
        "generation_config.json",
        _json({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "do_sample": False}),
    )
    picture = _curve_svg(record)
    if picture:
        _write(folder, "curve.svg", picture.encode())
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    _write(folder, "README.md", _card(record, config, files).encode())
