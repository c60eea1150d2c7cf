"""`tensormill`: the entry point, and what every command shares (errors, JSON, progress).

Commands import what they need when they run, so that `--help` is instant. A `TensormillError` becomes one line
on stderr and exit code 2, an interrupt exit code 130; stdout carries the result and nothing else.
"""

import json
import math
import os
import sys
import warnings
from typing import Annotated, Any

import typer

import tensormill
from tensormill.errors import TensormillError

app = typer.Typer(
    name="tensormill",
    help="Efficient-ML methods that run: compress a model, time the operators, measure papers' claims again.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, all else on stderr.")]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto (cuda where there is one).")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tensormill {tensormill.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def print_json(document: Any) -> None:
    """One valid JSON document on stdout; values that JSON has no number for become null."""
    print(json.dumps(_finite(document), indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def resolve_device(name: str) -> str:
    """ "auto" and device names from the command line, checked against this machine."""
    import torch

    from tensormill.errors import InvalidArgument

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidArgument(f"--device {name!r} given, expected cpu, cuda, cuda:N or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"--device {name!r} given, expected cpu, cuda, cuda:N or auto")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidArgument(
                f"--device {name} given, but this machine has no CUDA device; use cpu or auto"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise InvalidArgument(
                f"--device {name} given, but there are {torch.cuda.device_count()} CUDA devices"
            )
    return name


def main() -> None:
    """Run the command line; never shows a traceback unless TENSORMILL_TRACEBACK is set."""
    from tensormill.cli import bench_model, compare, compress, operators, papers  # noqa: F401  (each registers its commands)

    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = app(standalone_mode=False)
        if code == 130:  # what typer makes of an interrupt
            raise KeyboardInterrupt
    except TensormillError as error:
        _fail(error, 2)
    except (KeyboardInterrupt, typer.Abort) as error:
        _fail(error, 130, "interrupted; nothing was left half-written")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError) as error:
        _fail(error, 2)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a wrong option has it
            raise
        _fail(error, 2, f"{error.format_message()} (see tensormill --help)")
    sys.exit(code if isinstance(code, int) else 0)


def _warn(message: Warning | str, *_where: Any, **_more: Any) -> None:
    print(f"tensormill: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(error: BaseException, code: int, message: str | None = None) -> None:
    if os.environ.get("TENSORMILL_TRACEBACK"):
        raise error
    text = " ".join((message or str(error) or type(error).__name__).split())
    print(f"tensormill: {text}", file=sys.stderr)
    sys.exit(code)
