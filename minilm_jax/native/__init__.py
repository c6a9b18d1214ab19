"""Kernels for CPUs in C++, compiled on the machine they run on, and kept.

XLA's CPU backend computes a softmax between two products as passes over arrays in memory; these
kernels keep a block of it in a core's caches. Like `torch.compile` on a CPU they need a C++
compiler (`$CXX`, c++, g++ or clang++). Where there is none, or it fails, XLA's operations compute
the same, two to four times slower; nothing else depends on it.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import jax
import jaxlib
from jaxtyping import Array

from minilm_jax.rows import vary_like, zeros_like_any

log = logging.getLogger(__name__)

Source = Literal["attention", "relations"]
HANDLERS: dict[Source, tuple[str, ...]] = {
    "attention": ("AttentionForward", "AttentionBackward"),
    "relations": ("RelationLoss", "RelationLossAndGradients"),
}
"""What each file exports: handlers of XLA's foreign function interface."""

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
OWN = (("-march=native", "-mtune=generic"), ("-march=native",), ("-mcpu=native",))
"""To take the processor's own instructions; of these the first that the compiler knows.

Tuned for AMD's processors, GCC reads the operands of a tile from memory for each row again, at 4/5
of the rate; tuned for Intel's it makes what it makes of the generic one.
"""
SECONDS = 300
"""After which a compiler has failed."""

_COMPILING = ".compiling-"
_locks = {source: threading.Lock() for source in HANDLERS}


def begin() -> None:
    """Starts to load all kernels, beside what a job does before it needs them."""
    for source in HANDLERS:
        threading.Thread(target=load, args=(source,), daemon=True).start()


def load(source: Source) -> bool:
    """Returns whether the kernels of a file can be called.

    The first call in a process loads them, the first on a machine compiles them, in some seconds:
    into `$XDG_CACHE_HOME/minilm_jax/native`, under a name that says sources, compiler, processor
    and jaxlib, and the library's own contents. `MINILM_JAX_NATIVE=0` keeps to XLA's operations.
    """
    with _locks[source]:
        return _load(source)


def call(
    handler: str, *arrays: Array, outputs: Sequence[tuple[int, ...]], **attributes: Any
) -> list[Array]:
    """Returns fp32 arrays of the shapes `outputs`, which the handler makes of the arrays.

    Its file has to be loaded. Attributes are numpy scalars of the handler's types.
    """

    def shapes(*arrays: Array) -> list[Array]:
        return [zeros_like_any(shape, like=arrays) for shape in outputs]

    results = jax.eval_shape(shapes, *arrays)
    # What vmap maps over is met one after another: right, if slower.
    run = jax.ffi.ffi_call(_target(handler), results, vmap_method="sequential")
    return list(run(*vary_like(arrays, like=arrays), **attributes))


def _target(handler: str) -> str:
    return f"minilm_jax.{handler}"


@functools.cache
def _load(source: Source) -> bool:
    if os.environ.get("MINILM_JAX_NATIVE") == "0":
        return False
    compiler = _compiler()
    if compiler is None:
        log.info("There is no C++ compiler: %s takes XLA's operations.", source)
        return False
    try:
        library = ctypes.CDLL(str(_compiled(source, compiler)))
        for handler in HANDLERS[source]:
            capsule = jax.ffi.pycapsule(getattr(library, handler))
            jax.ffi.register_ffi_target(_target(handler), capsule, platform="cpu")
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        log.warning(
            "%s could not compile the CPU kernels of %s.cc; XLA's operations are taken instead, "
            "which are slower: %s",
            " ".join(compiler),
            source,
            said[:2000],
        )
        return False
    return True


def _compiler() -> list[str] | None:
    """Returns how a command that compiles begins: `$CXX` may hold options, as make allows."""
    named = os.environ.get("CXX", "").split()
    commands = [named] if named else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in commands if shutil.which(command[0])), None)


def _compiled(source: Source, compiler: list[str]) -> Path:
    """Returns the file's library, compiled if this machine has not done so."""
    flags, processor = _flags_and_processor(compiler)
    said = [processor, " ".join(flags), jaxlib.__version__]
    texts = [(SOURCES / name).read_text() for name in (f"{source}.cc", "tiles.h")]
    name, cache = f"{source}-{_digest(chr(0).join(said + texts).encode())}", _cache()
    # To load a library that was cut short, as by a crash of the machine, can end the process.
    for path in cache.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_digest(path.read_bytes())}":
            return path
    _remove_abandoned(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=_COMPILING) as folder:
        made = Path(folder) / f"{name}.so"
        include = ["-I", str(SOURCES), "-isystem", jax.ffi.include_dir()]
        output = ["-fPIC", "-shared", "-o", str(made)]
        _run([*compiler, *flags, *include, str(SOURCES / f"{source}.cc"), *output])
        # Other processes may compile the same: whoever is last replaces it by its like.
        return made.replace(cache / f"{name}-{_digest(made.read_bytes())}.so")


def _remove_abandoned(cache: Path) -> None:
    """Removes what processes that were killed while they compiled have left."""
    for folder in cache.glob(f"{_COMPILING}*"):
        with suppress(FileNotFoundError):  # another process is done with it
            # Far longer than any compiler is given, whatever the clocks of the machines say.
            if time.time() - folder.stat().st_mtime > 24 * 3600:
                shutil.rmtree(folder, ignore_errors=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _flags_and_processor(compiler: list[str]) -> tuple[list[str], str]:
    """Returns flags, and what the compiler defines by them: its version, the processor's vectors.

    A home directory may be shared by machines of different processors.
    """
    empty = ["-x", "c++", "-dM", "-E", os.devnull]
    for own in OWN:
        try:
            return [*FLAGS, *own], _run([*compiler, *FLAGS, *own, *empty])
        except subprocess.CalledProcessError:
            continue
    return [*FLAGS], _run([*compiler, *FLAGS, *empty])


def _cache() -> Path:
    """Returns the folder for libraries; one for this process where there can be no lasting one."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "minilm_jax" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # no home, or none to write to
        return _passing_cache()


@functools.cache
def _passing_cache() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="minilm_jax-native-")
    _passing.append(folder)
    return Path(folder.name)


_passing: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when the process ends."""


def _run(command: list[str]) -> str:
    # What a compiler says may be in another encoding than this process's.
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=SECONDS
    )
    return done.stdout
