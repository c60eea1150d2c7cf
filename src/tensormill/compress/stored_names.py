"""What the tensors of a checkpoint's files are called in the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def names_in_model(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Each name in a checkpoint's files with the name that the model has for it, as transformers renames them.

    Args:
        model: a transformers model, whose experts may be taken apart.
        stored: names in the files, of packed tensors too.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    own = model.state_dict().keys()
    found = {}
    for original in sorted(stored):  # some renamings wait for a name that comes before theirs
        name = original
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        found[original] = original if original in own and name not in own else name
    return found
