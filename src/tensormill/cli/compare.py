"""`tensormill compare`."""

from pathlib import Path
from typing import Annotated

import typer

from tensormill.cli.app import Device, Json, app, print_json, resolve_device
from tensormill.cli.compress import CalibrationText, Dtype, Model, Text, dtype_named, widths
from tensormill.cli.progress import progress_bar


@app.command()
def compare(
    model: Model,
    methods: Annotated[
        str,
        typer.Option(
            "--methods", "-m", help="Methods, with settings of their own: rtn,gptq,awq:rounding=gptq."
        ),
    ] = "rtn,gptq,awq",
    bits: Annotated[str, typer.Option(help="Bit widths, each 2 to 8, e.g. 2,3,4.")] = "2,3,4",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1: a whole row.")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Without zero points.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of compare.html and compare.json.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a comparison that lies there.")] = False,
    calibration: CalibrationText = None,
    text: Text = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows of 512 tokens.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Evaluate on at most so many tokens; 0 takes all.")] = 8192,
    device: Device = "auto",
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Of the prompt on which speed is measured.")] = 0,
    json: Json = False,
) -> None:
    """Show which method at which width: quality against bytes and speed, as a table and a page."""
    from tensormill.compress.comparison import compare as run

    names = [name.strip() for name in methods.split(",") if name.strip()]
    chosen = widths(bits, "--bits")
    where = resolve_device(device)
    with progress_bar() as progress:
        found = run(
            model,
            methods=names,
            bits=chosen,
            group_size=group_size,
            symmetric=symmetric,
            output=output,
            overwrite=overwrite,
            calibration_text=calibration,
            text=text,
            samples=samples,
            max_tokens=max_tokens or None,
            device=where,
            dtype=dtype_named(dtype),
            seed=seed,
            progress=progress,
        )
    if json:
        print_json(found.to_dict())
        return
    from rich.console import Console

    console = Console()
    found.print(console)
    console.print(
        f"Page: {Path(found.output) / 'compare.html'}", soft_wrap=True, markup=False, highlight=False
    )
