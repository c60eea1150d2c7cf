"""`tensormill compress`, `tensormill evaluate` and `tensormill generate`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tensormill.cli.app import Device, Json, app, print_json, resolve_device
from tensormill.cli.progress import progress_bar
from tensormill.errors import InvalidArgument

Model = Annotated[
    str, typer.Argument(help="A checkpoint directory of transformers, a GGUF file, or builtin:python-lm.")
]
Text = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Text file to evaluate on; repeatable. Default: held-out standard library."),
]
CalibrationText = Annotated[
    list[Path] | None,
    typer.Option("--calibration", help="Text file to calibrate on; repeatable. Default: standard library."),
]
MaxTokens = Annotated[int, typer.Option(help="Evaluate on at most so many tokens; 0 takes all.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: the checkpoint's.")]


@app.command()
def compress(
    model: Model,
    method: Annotated[str, typer.Option("--method", "-m", help="awq, gptq or rtn.")] = "awq",
    bits: Annotated[int | None, typer.Option(help="Bits of a weight, 2 to 8. Default: 4.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; -1: a whole row. Default: 128.")
    ] = None,
    symmetric: Annotated[bool | None, typer.Option(help="Without zero points.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Another setting of the method, NAME=VALUE; repeatable.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML list of steps, instead of --method.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Choose each layer's bits within 4.25bpw, 9MB, ppl+2% or 30tok/s; a speed also after a comma."
        ),
    ] = None,
    choose_from: Annotated[
        str | None, typer.Option("--widths", help="Bits to choose from with --budget. Default: 2 to 8.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of the result.")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="compressed-tensors, awq, gptq or gptq_v2. Default: compressed-tensors."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that lies there.")] = False,
    calibration: CalibrationText = None,
    calibration_pairs: Annotated[
        Path | None,
        typer.Option(
            help='Lines {"image": path, "text": "..."} to calibrate on, for models that read images.'
        ),
    ] = None,
    text: Text = None,
    max_tokens: MaxTokens = 65536,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Go from disk to disk, block by block, and resume. Default: where the model is large.",
        ),
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure quality and speed.")] = True,
    curve: Annotated[
        str | None, typer.Option(help="Bit widths, e.g. 2,3,4, at which to plot RTN, GPTQ and AWQ.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Of intervals and prompts.")] = 0,
    json: Json = False,
) -> None:
    """Write a smaller, faster checkpoint that transformers loads, and report what it cost."""
    from tensormill.compress import compress as run
    from tensormill.compress.recipe import read_settings

    settings = read_settings(set_ or [], "--set")
    given = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    settings.update({name: value for name, value in given.items() if value is not None})
    where = resolve_device(device)
    leads = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    try:
        with progress_bar(quiet=not leads) as progress:
            report = run(
                model,
                method,
                output=output,
                format=format,
                recipe=recipe,
                budget=budget,
                widths=None if choose_from is None else widths(choose_from, "--widths"),
                calibration_text=calibration,
                calibration_pairs=calibration_pairs,
                text=text,
                device=where,
                dtype=dtype_named(dtype),
                overwrite=overwrite,
                stream=stream,
                evaluate=evaluate,
                max_tokens=max_tokens or None,
                curve=_widths(curve),
                seed=seed,
                progress=progress,
                **settings,
            )
    except KeyboardInterrupt as error:
        if not error.args:
            raise
        print(f"tensormill: {error}", file=sys.stderr)
        sys.exit(130)
    if not leads:
        return
    if json:
        print_json(report.to_dict())
        return
    from rich.console import Console

    console = Console()
    report.print(console)
    console.print(
        f"Report: {Path(report.output) / 'report.html'}", soft_wrap=True, markup=False, highlight=False
    )


@app.command()
def evaluate(
    path: Model,
    text: Text = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    max_tokens: MaxTokens = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Perplexity and bits per byte of a model, compressed or not."""
    from tensormill.compress.evaluate import evaluate as run
    from tensormill.compress.pipeline import evaluation_text

    texts, name = evaluation_text(text)
    model, tokenizer = _open(path, resolve_device(device), dtype_named(dtype))
    with progress_bar() as progress:
        found = run(model, tokenizer, texts, window=window, max_tokens=max_tokens or None, progress=progress)
    result = {
        "model": path,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "windows": found.windows,
        "text": name,
    }
    if json:
        print_json(result)
        return
    print(f"perplexity     {found.perplexity:.4f}")
    print(f"bits per byte  {found.bits_per_byte:.4f}")
    print(f"on             {found.tokens} tokens, {found.bytes} bytes of {name}")


@app.command()
def generate(
    path: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Nucleus, where temperature is above 0.")
    ] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(min=1.0, help="1 is none.")] = 1.1,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Let a model go on from a prompt, and say how fast it did."""
    import time

    import torch
    from transformers import TextStreamer

    from tensormill.models.decoding import why_not_prepared

    model, tokenizer = _open(path, resolve_device(device), dtype_named(dtype))
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=True).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise InvalidArgument("given an empty prompt, expected some text")
    streamer = None if json else TextStreamer(tokenizer, skip_special_tokens=True)
    begin = time.perf_counter()
    if temperature == 0 and why_not_prepared(model) is None:
        new = _generate_greedily(model, inputs["input_ids"][0], tokens, repetition_penalty, streamer)
    else:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            repetition_penalty=repetition_penalty,
            pad_token_id=padding,
            streamer=streamer,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
    seconds = time.perf_counter() - begin
    if json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        print_json({"model": path, "prompt": prompt, "text": text, "tokens": len(new), "seconds": seconds})
    else:
        print(f"\n{len(new)} tokens, {len(new) / seconds:.1f} per second", file=sys.stderr)


def _generate_greedily(
    model: Any, prompt: Any, tokens: int, repetition_penalty: float, streamer: Any
) -> list[int]:
    """New tokens of a prompt through the prepared decoder, as `generate` would choose them."""
    import torch

    from tensormill.models.decoding import stream_greedy

    ends = model.generation_config.eos_token_id
    stop = set(ends) if isinstance(ends, (list, tuple)) else {ends} - {None}
    if streamer is not None:
        streamer.put(prompt.cpu())
    new = []
    for token in stream_greedy(model, prompt, tokens, stop=stop, repetition_penalty=repetition_penalty):
        new.append(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    return new


def _open(path: str, device: str, dtype: Any) -> tuple[Any, Any]:
    """A model, compressed or not, with its tokenizer."""
    from tensormill.compress import checkpoint
    from tensormill.compress.pipeline import missing_tokenizer, open_with_tokenizer

    if not checkpoint.is_compressed(path):
        return open_with_tokenizer(path, device, dtype)
    model = checkpoint.load(path, device=device, dtype=dtype)
    tokenizer = checkpoint.open_tokenizer(checkpoint.resolve_path(path))
    if tokenizer is None:
        raise missing_tokenizer(path)
    return model, tokenizer


def dtype_named(name: str | None) -> Any:
    """The dtype that `--dtype` names; None for None."""
    import torch

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name is not None and name not in known:
        raise InvalidArgument(f"--dtype {name!r} given, expected one of {', '.join(known)}")
    return None if name is None else known[name]


def _widths(text: str | None) -> list[int]:
    return widths(text, "--curve") if text and text.strip() else []


def widths(text: str, option: str) -> list[int]:
    """Bit widths from a list such as 2,3,4; whether they are possible is for others to say."""
    try:
        return [int(width) for width in text.split(",") if width.strip()]
    except ValueError:
        raise InvalidArgument(f"{option} {text!r} given, expected bit widths such as 2,3,4") from None
