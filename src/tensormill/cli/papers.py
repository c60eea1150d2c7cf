"""`tensormill papers` and `tensormill reproduce`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tensormill.cli.app import Device, Json, app, print_json, resolve_device
from tensormill.cli.progress import progress_bar


@app.command()
def papers(
    status: Annotated[str | None, typer.Option(help="Only papers of this status.")] = None,
    json: Json = False,
) -> None:
    """List the 47 papers: what each claims, what has been measured, what holds, what is stale."""
    from tensormill.papers.reproduce import papers as all_papers

    rows = [row for row in all_papers() if status is None or row["status"] == status]
    if json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

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
    from tensormill.papers.page import exponents, to_html, with_recorded
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
    from rich.table import Table

    console = Console()
    console.print(f"{result['paper']} on {result['device']}", style="bold")
    if not result["claims"]:
        console.print("planned: no claim of this paper is measured yet")
    for measured in result["claims"]:
        verdict = {True: "holds", False: "does not hold", None: "not measured"}[measured["holds"]]
        console.print(f"\n{measured['id']}: {measured['statement']}", markup=False)
        console.print(f"paper: {measured['paper_value']} {measured['unit']}; here: {verdict}", markup=False)
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
    if page is not None:
        console.print(f"\nPlots and everything measured: {page}", markup=False, soft_wrap=True)
