"""Pages that stand alone: a template of this package, its style and its plots in one HTML file without script."""

from __future__ import annotations

from importlib import resources
from typing import Any

from tensormill.compress.plots import PLOT_STYLE


def render_page(template: str, *, plots: dict[str, str], **values: Any) -> str:
    """The page as one text that needs no other file and no network.

    Args:
        template: File name of a Jinja template in this package.
        plots: SVG by name, put in as it is; plots escape their own texts.
        **values: What else the template asks for. Names and paths are the user's: all of it is escaped.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = resources.files("tensormill.compress")
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return engine.from_string(folder.joinpath(template).read_text(encoding="utf-8")).render(
        page_style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        plot_style=Markup(PLOT_STYLE),
        **{name: Markup(svg) for name, svg in plots.items()},
        **values,
    )
