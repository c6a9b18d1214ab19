"""What code a run was computed with."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import minilm_jax

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def software() -> dict[str, str | None]:
    """Returns the versions of Python, this package and its libraries, and the git revision.

    The revision is None where the package is not run from a checkout of its own, and ends in -dirty
    where the checkout differs from it.
    """
    return {
        "python": platform.python_version(),
        "minilm_jax": minilm_jax.__version__,
        **{name: metadata.version(name) for name in _LIBRARIES},
        "revision": _revision(Path(minilm_jax.__file__).parents[1]),
    }


def _revision(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    # Excluding every tag leaves the hash.
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user
        return None
    return found.stdout.strip()
