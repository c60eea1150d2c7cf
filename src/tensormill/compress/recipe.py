"""Recipes: which methods to apply to which layers with which settings, as a YAML list of steps.

    - method: awq
      bits: 4
      skip: [lm_head, "*.down_proj"]
    - method: gptq
      bits: 8
      only: ["*.down_proj"]

Steps run in order. Two steps that would round the same layers contradict one another. An entry `- format: awq`
says how the checkpoint is written (`formats.registry`).
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from tensormill.compress.methods import METHODS, WeightConfig
from tensormill.errors import InvalidArgument, RecipeError


@dataclass(frozen=True)
class Step:
    """One method with its settings; `name` is what tables call it."""

    method: str
    config: WeightConfig
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.method)

    @classmethod
    def of(cls, method: str, settings: Mapping[str, Any] | None = None) -> Step:
        """Build a step from plain settings.

        Raises:
            RecipeError: no such method, or a setting that it doesn't have.
            InvalidArgument: a setting outside its range.

        >>> Step.of("rtn", {"bits": 3}).config.bits
        3
        """
        if not isinstance(method, str) or method not in METHODS:
            raise RecipeError(f"given method {method!r}, expected one of {list(METHODS)}")
        config_class, _ = METHODS[method]
        settings = dict(settings or {})
        known = [field.name for field in fields(config_class)]
        unknown = [key for key in settings if key not in known]
        if unknown:
            raise RecipeError(
                f"given {', '.join(map(repr, unknown))} for {method}, which it doesn't have; valid settings: "
                f"{', '.join(known)}"
            )
        return cls(method, config_class(**settings))


class Recipe(list[Step]):
    """The steps of a recipe.

    Attributes:
        format: the checkpoint's format, or None if the recipe doesn't say.
    """

    def __init__(self, steps: Iterable[Step] = (), format: str | None = None) -> None:
        super().__init__(steps)
        self.format = format


def read_settings(items: Iterable[str], where: str) -> dict[str, Any]:
    """NAME=VALUE items; the value is read as YAML, so numbers, lists and true are what they look like.

    Args:
        items: as given.
        where: what they were given with, for messages.

    Raises:
        InvalidArgument: an item of another form.

    >>> read_settings(["duo_scaling=both", "n_grid=40"], "--set")
    {'duo_scaling': 'both', 'n_grid': 40}
    """
    import yaml

    settings = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator or not name.strip():
            raise InvalidArgument(f"given {item!r} with {where}, expected NAME=VALUE")
        try:
            settings[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InvalidArgument(f"given {item!r} with {where}, its value can't be read; quote it") from None
    return settings


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe file.

    Raises:
        RecipeError: the file can't be read, isn't a list of steps, or its steps contradict one another.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"given recipe {os.fspath(path)}, which can't be read ({error}); pass a YAML file"
        ) from None
    return parse_recipe(text)


def parse_recipe(recipe: str | Sequence[Mapping[str, Any]]) -> Recipe:
    """The steps of a recipe, given as YAML text or as what it holds.

    >>> [step.config.bits for step in parse_recipe("- {method: awq, bits: 3}")]
    [3]
    >>> parse_recipe("[{format: gptq}, {method: rtn}]").format
    'gptq'

    Raises:
        RecipeError: no list of steps, an unknown method, setting or format, a setting out of range, or two
            steps for the same layers.
    """
    import yaml

    if isinstance(recipe, str):
        try:
            recipe = yaml.safe_load(recipe)
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            line = f" in line {where.line + 1}" if where else ""
            raise RecipeError(f"given a recipe that is no YAML{line}, expected a list of steps") from None
    if not isinstance(recipe, (list, tuple)) or not recipe:
        raise RecipeError(
            f"given a recipe that holds {_describe(recipe)}, expected a list of steps like '- method: awq'"
        )
    steps, formats = [], []
    for number, entry in enumerate(recipe, 1):
        if isinstance(entry, Mapping) and set(entry) == {"format"}:
            formats.append(entry["format"])
            continue
        if not isinstance(entry, Mapping) or "method" not in entry:
            raise RecipeError(f"given {_describe(entry)} as step {number}, expected settings with a 'method'")
        settings = {key: value for key, value in entry.items() if key != "method"}
        try:
            steps.append(Step.of(entry["method"], settings))
        except (RecipeError, InvalidArgument) as error:
            raise RecipeError(f"step {number}: {error}") from None
    if not steps:
        raise RecipeError("given a recipe that holds no method, expected steps like '- method: awq'")
    if len(formats) > 1:
        raise RecipeError(f"given a recipe with the formats {formats}, expected one")
    check_conflicts(steps)
    return Recipe(steps, _checked_format(formats[0]) if formats else None)


def _checked_format(name: Any) -> str:
    from tensormill.compress.formats.registry import format_named

    try:
        return format_named(name if isinstance(name, str) else repr(name)).name
    except InvalidArgument as error:
        raise RecipeError(f"given a recipe with an unknown format: {error}") from None


def check_conflicts(steps: Sequence[Step]) -> None:
    """Raise `RecipeError`, naming both, if two steps would change the weights of the same layers."""
    for (first, a), (second, b) in combinations(enumerate(steps, 1), 2):
        if _may_overlap(a.config, b.config):
            raise RecipeError(
                f"given steps {first} ({a.method}) and {second} ({b.method}), which round the same layers; "
                "give each its layers with 'only', or list in one's 'skip' what the other has in 'only'"
            )


def _may_overlap(a: WeightConfig, b: WeightConfig) -> bool:
    for one, other in ((a, b), (b, a)):
        if one.only is not None and set(one.only) <= set(other.skip):
            return False
    if a.only is None or b.only is None:
        return True
    return any(
        fnmatch.fnmatchcase(x, y)
        or fnmatch.fnmatchcase(y, x)
        or fnmatch.fnmatchcase(f".{x}", y)
        or fnmatch.fnmatchcase(f".{y}", x)
        for x in a.only
        for y in b.only
    )


def _describe(value: Any) -> str:
    return "nothing" if value is None or value in ([], {}, "") else f"a {type(value).__name__}"
