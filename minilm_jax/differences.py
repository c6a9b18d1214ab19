"""What differs between two sets of settings, as a user reads it."""

import json
from typing import Any


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Returns (dotted name, "name: old -> new") of every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in [*old, *(name for name in new if name not in old)]:
            inner = f"{prefix}.{name}" if prefix else name
            found += differences(old.get(name), new.get(name), inner)
        return found
    return [] if old == new else [(prefix, f"{prefix}: {json.dumps(old)} -> {json.dumps(new)}")]
