"""What differs between two sets of settings, as a user reads it."""

import json
from pathlib import Path
from typing import Any

_LONGEST = 200


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Returns (dotted name, "name: old -> new") of every leaf that differs.

    Two ways to name one file or folder, such as a relative path and an absolute one, do not.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in [*old, *(name for name in new if name not in old)]:
            inner = f"{prefix}.{name}" if prefix else name
            found += differences(old.get(name), new.get(name), inner)
        return found
    if old == new or _are_one_path(old, new):
        return []
    return [(prefix, f"{prefix}: {_shown(old)} -> {_shown(new)}")]


def _shown(value: Any) -> str:
    """Returns what tells a value: whole groups of settings would fill the screen."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def dotted_names(settings: Any, prefix: str = "") -> set[str]:
    """Returns the dotted name of every leaf, and of every group of them."""
    if not isinstance(settings, dict):
        return set()
    found = {f"{prefix}{name}" for name in settings}
    return found.union(*(dotted_names(x, f"{prefix}{name}.") for name, x in settings.items()))


def _are_one_path(old: Any, new: Any) -> bool:
    if not (isinstance(old, str) and isinstance(new, str)):
        return False
    try:
        return Path(old).samefile(new)
    except (OSError, ValueError):  # nothing lies there, or it can be no path
        return False
