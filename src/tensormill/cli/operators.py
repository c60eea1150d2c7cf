"""`tensormill ops` and `tensormill bench`."""

import sys
from typing import Annotated, Any

import typer

from tensormill.cli.app import Device, Json, app, print_json, resolve_device
from tensormill.errors import InvalidArgument, TensormillError


@app.command()
def ops(json: Json = False) -> None:
    """List the operators, their implementations, and which can run here."""
    import torch

    from tensormill.ops import OPERATORS
    from tensormill.papers.benchmarks import read_operator_records

    recorded = read_operator_records()
    have = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    rows: list[dict[str, Any]] = []
    for name, operator in sorted(OPERATORS.items()):
        why = {i.name: _why_not(i, have) for i in operator.implementations}
        rows.append(
            {
                "name": name,
                "schema": operator.schema,
                "implementations": list(why),
                "available": [i for i, reason in why.items() if reason is None],
                "unavailable": {i: reason for i, reason in why.items() if reason is not None},
                "devices": {i.name: list(i.devices) for i in operator.implementations},
                "peers": [p.name for p in operator.peers],
                "recorded": [
                    {"device": r.device, "date": r.date, "shapes": len(r.rows), "stale": r.stale}
                    for r in recorded
                    if r.operator == name
                ],
            }
        )
    if json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("operator", "implementation", "runs on", "here", box=None, pad_edge=False)
    for row in rows:
        for i, implementation in enumerate(row["implementations"]):
            reason = row["unavailable"].get(implementation)
            devices = ", ".join(row["devices"][implementation])
            table.add_row(
                "" if i else row["name"], implementation, devices, f"no: {reason}" if reason else "yes"
            )
    Console().print(table)
    for row in rows:
        for record in row["recorded"]:
            state = ", stale: measure again with --record" if record["stale"] else ""
            print(
                f"{row['name']} on {record['device']}: {record['shapes']} rows of {record['date'][:10]}{state}"
            )


def _why_not(implementation: Any, have: set[str]) -> str | None:
    if (reason := implementation.missing()) is not None:
        return str(reason)
    if not have & set(implementation.devices):
        return f"no {' or '.join(implementation.devices)} device"
    return None


@app.command()
def bench(
    operator: Annotated[str, typer.Argument(help="An operator of `tensormill ops`.")],
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", help="Sizes as NAME=VALUE[,NAME=VALUE...]; may be given several times."),
    ] = None,
    device: Device = "auto",
    implementation: Annotated[
        list[str] | None,
        typer.Option("--implementation", "-i", help="Only these; may be given several times."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each competitor and shape.")] = 1.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; torch's default otherwise.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Add the rows to results/operators, with plots.")
    ] = False,
    json: Json = False,
) -> None:
    """Check, then time an operator: seconds, share of the roofline limit, ratio to each peer, in one run."""
    import torch

    from tensormill.measure import warn_if_busy
    from tensormill.ops import OPERATORS
    from tensormill.ops.benchmark import benchmark, complete_shape, default_shapes
    from tensormill.papers.benchmarks import operator_sources, record_benchmark

    if operator not in OPERATORS:
        raise InvalidArgument(f"no operator {operator!r}; there are {', '.join(sorted(OPERATORS))}")
    where = torch.device(resolve_device(device))
    if threads is not None:
        torch.set_num_threads(threads)
    spec = OPERATORS[operator]
    for name in implementation or []:
        spec.find(name)
    shapes = [complete_shape(spec, _parse(text)) for text in shape or []] or default_shapes(spec, where)
    warn_if_busy()
    sources = operator_sources(operator) if record else {}
    try:
        rows = benchmark(
            spec,
            shapes,
            where,
            implementations=implementation,
            seconds=seconds,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except TensormillError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not shape:
            raise
        # Samples are made without the checks of the public functions.
        what = next(iter(str(error).splitlines()), "")
        raise InvalidArgument(
            f"--shape {' '.join(shape)} given, expected sizes that {operator} takes ({type(error).__name__}: {what})"
        ) from error
    if json:
        print_json([row.to_json() for row in rows])
    else:
        _print(rows)
    if record:
        path = record_benchmark(operator, rows, str(where), sources)
        print(f"recorded in {path}", file=sys.stderr)


def _parse(text: str) -> dict[str, Any]:
    """`M=1,dtype=bfloat16,symmetric=true` as a dictionary."""
    shape: dict[str, Any] = {}
    for item in text.split(","):
        name, separator, value = item.partition("=")
        if not separator or not name.strip():
            raise InvalidArgument(f"--shape {text!r} given, expected NAME=VALUE[,NAME=VALUE...]")
        shape[name.strip()] = _value(value.strip())
    return shape


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _print(rows: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tensormill.ops.benchmark import format_shape

    table = Table(
        "shape", "implementation", "time", "of the limit", "against peers (above 1: faster)", box=None
    )
    for row in rows:
        ratios = ", ".join(f"{r:.2f}x {peer}" for peer, r in row.ratio_to_peer.items()) or "no peer here"
        spread = f"{row.seconds * 1e6:,.1f} us ({row.low * 1e6:,.1f}-{row.high * 1e6:,.1f})"
        share = f"{row.limit_seconds / row.seconds:.0%}" if row.limit_seconds else "-"
        table.add_row(format_shape(row.shape), row.implementation, spread, share, ratios)
    Console().print(table)
    for name, reason in {n: r for row in rows for n, r in row.skipped.items()}.items():
        print(f"not timed: {name}: {reason}", file=sys.stderr)
