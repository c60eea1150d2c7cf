"""Pages that stand alone: a room's template, the style and its plots in one HTML file without script."""

from __future__ import annotations

from importlib import resources
from typing import Any

from tensormill.plots import PLOT_STYLE


def render_page(
    template: str, *, room: str = "tensormill.compress", plots: dict[str, str], **values: Any
) -> str:
    """The page as one text that needs no other file and no network.

    Args:
        template: File name of a Jinja template.
        room: Package that holds the template.
        plots: SVG by name, put in as it is; plots escape their own texts.
        **values: What else the template asks for. Names and paths are the user's: all of it is escaped.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return engine.from_string(resources.files(room).joinpath(template).read_text(encoding="utf-8")).render(
        page_style=Markup(resources.files("tensormill").joinpath("page.css").read_text(encoding="utf-8")),
        plot_style=Markup(PLOT_STYLE),
        **{name: Markup(svg) for name, svg in plots.items()},
        **values,
    )
