"""One run of `tensormill reproduce` as a page: verdicts, rows beside peers and limits, curves with their exponents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensormill.papers.curves import curve_plots
from tensormill.papers.records import read_records
from tensormill.plots import format_value

_SHOWN = ("statement", "criterion", "paper_value", "unit", "holds", "reason", "seconds", "rows", "curves")
VERDICTS = {True: "holds", False: "does not hold", None: "not measured"}


def to_html(result: Mapping[str, Any]) -> str:
    """What `reproduce` returned, as one page that needs no other file, no network and no script."""
    from markupsafe import Markup

    from tensormill.page import render_page

    return render_page(
        "page.html.jinja",
        room="tensormill.papers",
        plots={},
        result=result,
        claims=[
            {
                **claim,
                "verdict": VERDICTS[claim["holds"]],
                "plots": [Markup(svg) for svg in curve_plots(claim["curves"])],
                "exponents": exponents(claim["curves"]),
                "table": [_cells(row) for row in claim["rows"]],
            }
            for claim in result["claims"]
        ],
    )


def with_recorded(result: Mapping[str, Any]) -> dict[str, Any]:
    """What `reproduce` returned, and after it the paper's other claims as recorded at that scale on that device."""
    present = {claim["id"] for claim in result["claims"]}
    others = [
        {"id": record.claim, **{name: getattr(record, name) for name in _SHOWN}}
        for record in read_records(result["paper"])
        if (record.scale, record.device) == (result["scale"], result["device"])
        and record.claim not in present
    ]
    return {**result, "claims": sorted([*result["claims"], *others], key=lambda claim: claim["id"])}


def exponents(curves: list[dict[str, Any]]) -> list[str]:
    """One sentence for each curve to which a power was fitted."""
    return [
        f"{curve['name']}: {curve['y_label']} ~ {curve['x_label']}^{power['value']:.3f}"
        f" ({power['low']:.3f} to {power['high']:.3f} at {power['confidence']:.0%}, {len(curve['x'])} sizes)"
        for curve in curves
        if (power := curve.get("exponent")) is not None
    ]


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    spread = row.get("spread")
    return {
        "what": row["what"],
        "value": format_value(row["value"], 4),
        "spread": f"{format_value(spread[0])} to {format_value(spread[1])}" if spread else "",
        "unit": row["unit"],
        "limit": format_value(row["limit"]) if row.get("limit") is not None else "",
        "peers": "; ".join(
            f"{name} {format_value(value, 4)}" for name, value in row.get("peers", {}).items()
        ),
    }
