"""`tensormill bench-model`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tensormill.cli.app import Device, Json, app, print_json, resolve_device
from tensormill.cli.compress import Dtype, dtype_named
from tensormill.cli.progress import progress_bar
from tensormill.errors import InvalidArgument

_PREFIX = "random:"
_DENSE = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@app.command("bench-model")
def bench_model(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint directory, compressed or not, builtin:python-lm, or random:llama-8b (-1b, -3b, -7b, -70b)."
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Measured in the same run: fp16, bf16 or fp32 (the same weights, dense), or a directory."
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, e.g. 1,16.")] = "1",
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of prompts, e.g. 128,2048.")] = "128",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after the first.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats; medians are reported.")] = 5,
    bits: Annotated[
        int | None, typer.Option(min=2, max=8, help="Round a dense model to nearest first (RTN); 2 to 8.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1: a whole row.")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Without zero points.")] = False,
    lm_head_bits: Annotated[
        int | None, typer.Option(min=2, max=8, help="Round the output layer too, which changes the logits.")
    ] = None,
    graph: Annotated[bool, typer.Option(help="Capture the step in a CUDA graph, on a GPU.")] = True,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the step, on all sides.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; torch's default otherwise.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write an HTML page with a plot here.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a page that lies there.")] = False,
    device: Device = "auto",
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Of prompts and random weights.")] = 0,
    json: Json = False,
) -> None:
    """Time a model end to end: first token, decoding, memory, share of the limit, beside a baseline."""
    import torch

    from tensormill.compress.output import check_files, write_files
    from tensormill.measure import warn_if_busy
    from tensormill.models.decoding import (
        PlainDecoder,
        compare_decoding,
        prepare_for_decoding,
        why_not_prepared,
    )
    from tensormill.models.decoding.report import DecodingReport
    from tensormill.roofline import ceilings, device_name

    if page is not None:
        check_files(page.parent, [page.name], overwrite=overwrite)
    where = resolve_device(device)
    sizes, lengths = _numbers(batch, "--batch"), _numbers(prompt_tokens, "--prompt-tokens")
    if threads is not None:
        torch.set_num_threads(threads)
    if where.startswith("cuda:"):
        torch.cuda.set_device(where)
    warn_if_busy()
    with progress_bar() as progress:
        progress(f"opening {model}", 0.0)
        opened = _open(model, bits, group_size, symmetric, lm_head_bits, where, dtype_named(dtype), seed)
        name = f"W{bits}" if bits is not None else "model"
        sides: dict[str, Any] = {}
        if baseline is not None:
            progress(f"opening the baseline {baseline}", 0.02)
            other = _baseline(baseline, model, opened, bits or lm_head_bits, where)
            short = baseline if baseline in _DENSE else "baseline"
            # The plain side first: it takes a model as it is, and preparation only moves the weights together.
            sides[f"{short} plain"] = (short, PlainDecoder(other))
            if why_not_prepared(other) is None:
                sides[f"{short} prepared"] = (short, prepare_for_decoding(other))
        refused = why_not_prepared(opened)
        own = prepare_for_decoding(opened) if refused is None else PlainDecoder(opened)
        progress("measuring the machine", 0.05)
        bandwidth = ceilings(where).bandwidth
        found = compare_decoding(
            {name: own, **{key: decoder for key, (_, decoder) in sides.items()}},
            batches=sizes,
            prompt_tokens=lengths,
            new_tokens=new_tokens,
            repeats=repeats,
            bandwidth=bandwidth,
            graph=None if graph else False,
            compile=compile,
            seed=seed,
            progress=lambda message, share: progress(message, None if share is None else 0.1 + 0.9 * share),
        )
    from dataclasses import replace

    rows = [replace(row, name=sides[row.name][0]) if row.name in sides else row for row in found]
    conditions = {
        "device": device_name(where),
        "torch": torch.__version__,
        "weights": _weights(bits, group_size, symmetric, lm_head_bits),
        "new tokens": str(new_tokens),
        "repeats": f"{repeats}, interleaved; medians",
        "compiled": "yes" if compile else "no",
        "bandwidth": f"{bandwidth / 1e9:.0f} GB/s",
    }
    if refused is not None:
        conditions["not prepared"] = refused
    report = DecodingReport(model, rows, conditions, bandwidth)
    if page is not None:
        write_files(page.parent, {page.name: report.to_html()})
    if json:
        print_json(report.to_dict())
        return
    from rich.console import Console

    console = Console()
    console.print(f"{model} on {conditions['device']}", style="bold", markup=False)
    report.print(console)
    if refused is not None:
        console.print(f"not prepared: {refused}", markup=False, style="dim")
    if page is not None:
        console.print(f"Page: {page}", soft_wrap=True, markup=False, highlight=False)


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InvalidArgument(f"{option} {text!r} given, expected numbers such as 1,16") from None


def _weights(bits: int | None, group_size: int, symmetric: bool, lm_head_bits: int | None) -> str:
    kind = "symmetric" if symmetric else "with zero points"
    blocks = "as they are" if bits is None else f"{bits} bits, group size {group_size}, {kind}"
    return blocks if lm_head_bits is None else f"{blocks}; lm_head {lm_head_bits} bits"


def _open(
    name: str,
    bits: int | None,
    group_size: int,
    symmetric: bool,
    lm_head_bits: int | None,
    device: str,
    dtype: Any,
    seed: int,
) -> Any:
    """The model that is measured, with its weights as the options say."""
    import torch

    from tensormill.compress import checkpoint, rtn
    from tensormill.models.decoding import random_llama

    if name.startswith(_PREFIX):
        default = torch.float16 if device.startswith("cuda") else torch.float32
        opened = random_llama(
            name.removeprefix(_PREFIX),
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            dtype=dtype or default,
            device=device,
            seed=seed,
        )
    elif checkpoint.is_compressed(name):
        if bits is not None:
            raise InvalidArgument(
                f"--bits {bits} given for {name}, which is compressed already; leave it out"
            )
        opened = checkpoint.load(name, device=device, dtype=dtype)
    else:
        opened, _ = checkpoint.open_model(name, device=device, dtype=dtype)
        if bits is not None:
            rtn.apply(opened, rtn.RTNConfig(bits=bits, group_size=group_size, symmetric=symmetric))
    if lm_head_bits is not None:
        _round_head(opened, lm_head_bits, group_size, symmetric)
    return opened


def _round_head(model: Any, bits: int, group_size: int, symmetric: bool) -> None:
    from tensormill.compress.formats.quantization import QuantSpec, quantize_weight
    from tensormill.compress.methods import replace_linear

    dtype = model.lm_head.weight.dtype
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
    replace_linear(model, "lm_head", quantize_weight(model.lm_head.weight.detach(), spec), dtype)


def _baseline(baseline: str, name: str, opened: Any, rounded: int | None, device: str) -> Any:
    """The model to compare with: the same one in 16 or 32 bits, or another."""
    from tensormill.compress import checkpoint
    from tensormill.models.decoding import dense_copy

    if baseline not in _DENSE:
        if not os.path.isdir(os.path.expanduser(baseline)) and not baseline.startswith("builtin:"):
            raise InvalidArgument(
                f"--baseline {baseline!r} given, expected {', '.join(_DENSE)}, or a checkpoint directory"
            )
        if checkpoint.is_compressed(baseline):
            return checkpoint.load(baseline, device=device)
        return checkpoint.open_model(baseline, device=device)[0]
    dtype = dtype_named(_DENSE[baseline])
    if rounded is not None and not name.startswith(_PREFIX):
        return checkpoint.open_model(name, device=device, dtype=dtype)[0]
    return dense_copy(opened, dtype)
