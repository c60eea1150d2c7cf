"""`tensormill papers` and `tensormill reproduce`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensormill.cli.app import Device, Json, app, print_json, resolve_device
from tensormill.cli.progress import progress_bar
from tensormill.errors import InvalidArgument

if TYPE_CHECKING:
    from rich.console import Console


@app.command()
def papers(
    paper: Annotated[
        str | None, typer.Argument(help="A paper's slug: show all that was recorded of it.")
    ] = None,
    status: Annotated[str | None, typer.Option(help="Only papers of this status.")] = None,
    json: Json = False,
) -> None:
    """List the 47 papers: what each claims, what has been measured, what holds, what is stale."""
    from tensormill.papers.catalogue import find_paper
    from tensormill.papers.records import STATUSES, read_records
    from tensormill.papers.reproduce import papers as all_papers

    if status not in (None, *STATUSES):
        raise InvalidArgument(f"given --status {status!r}, expected one of: {', '.join(STATUSES)}")
    claims = {} if paper is None else find_paper(paper).claims
    rows = [
        row
        for row in all_papers()
        if paper in (None, row["slug"]) and (status is None or row["status"] == status)
    ]
    if json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    if paper is not None:
        for row in rows:
            print(f"{row['title']} ({row['status']})")
        for record in read_records(paper) if rows else ():
            stale = record.claim not in claims or record.stale(claims[record.claim])
            run = f"{record.scale}, {record.device}, {record.date[:10]}{', stale' * stale}"
            _print_claim(Console(), {**vars(record), "id": record.claim}, run)
        return
    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("paper", no_wrap=True)
    table.add_column("title", no_wrap=True, overflow="ellipsis", ratio=1)
    for column in ("arXiv", "status"):
        table.add_column(column, no_wrap=True)
    table.add_column("claims measured")
    for row in rows:
        measured = ", ".join(_claim(c) for c in row["claims"] if c["device"] is not None)
        table.add_row(row["slug"], row["title"], row["arxiv"] or "-", row["status"], measured or "-")
    Console().print(table)


def _claim(claim: dict[str, Any]) -> str:
    verdict = {True: "holds", False: "does not hold", None: "measured"}[claim["holds"]]
    return f"{claim['id']} {claim['scale']}: {verdict}{' (stale)' if claim['stale'] else ''}"


def _print_claim(console: Console, measured: Mapping[str, Any], run: str = "here") -> None:
    from rich.table import Table

    from tensormill.papers.page import exponents

    verdict = {True: "holds", False: "does not hold", None: "not measured"}[measured["holds"]]
    console.print(f"\n{measured['id']}: {measured['statement']}", markup=False)
    console.print(f"paper: {measured['paper_value']} {measured['unit']}; {run}: {verdict}", markup=False)
    if measured["reason"]:
        console.print(measured["reason"], markup=False)
    table = Table("what", "value", "unit", box=None, padding=(0, 2, 0, 0))
    for row in measured["rows"]:
        value = row["value"]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(row["what"], shown, row["unit"])
    if measured["rows"]:
        console.print(table)
    for sentence in exponents(measured["curves"]):
        console.print(sentence, markup=False, style="dim")


@app.command()
def reproduce(
    paper: Annotated[str, typer.Argument(help="A paper's slug, as `tensormill papers` lists it.")],
    scale: Annotated[str, typer.Option(help="quick (a CPU, about a minute) or full.")] = "quick",
    device: Device = "auto",
    claim: Annotated[list[str] | None, typer.Option("--claim", help="Only this claim; repeatable.")] = None,
    record: Annotated[bool, typer.Option(help="Write the measurements to the results folder.")] = True,
    page: Annotated[
        Path | None, typer.Option(help="Where to write the page with plots; the results folder if recorded.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a page that lies there.")] = False,
    json: Json = False,
) -> None:
    """Measure a paper's claims again on this machine, beside the best peers."""
    from tensormill.compress.output import check_files, write_files
    from tensormill.papers.page import to_html, with_recorded
    from tensormill.papers.records import page_path
    from tensormill.papers.reproduce import reproduce as measure

    if page is not None:
        check_files(page.parent, [page.name], overwrite=overwrite)
    with progress_bar() as progress:
        result = measure(paper, scale, resolve_device(device), claim, record, progress)
    whole = result
    if page is None and record and result["claims"]:
        page, whole = page_path(result["paper"], scale, result["device"]), with_recorded(result)
    if page is not None:
        write_files(page.parent, {page.name: to_html(whole)})
    if json:
        print_json(result)
        return
    from rich.console import Console

    console = Console()
    console.print(f"{result['paper']} on {result['device']}", style="bold")
    if not result["claims"]:
        console.print("planned: no claim of this paper is measured yet")
    for measured in result["claims"]:
        _print_claim(console, measured)
    if page is not None:
        console.print(f"\nPlots and everything measured: {page}", markup=False, soft_wrap=True)
