"""How kernels for CPUs come to be loaded: compiled once, kept, and done without where they fail.

A script stands for the compiler and copies what the real one made: that takes seconds.
"""

import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm_jax import native
from minilm_jax.encoder.dot_product import dot_product_attention
from tests.native_kernels import as_one_device, calls, require_kernels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a process that has loaded nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MINILM_JAX_NATIVE", raising=False)
    load_anew(monkeypatch)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)
    return tmp_path / "cache" / "minilm_jax" / "native"


def load_anew(monkeypatch):
    monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))


class Script:
    """A compiler made of a shell's commands, and what it was called with."""

    def __init__(self, folder, *, describe="echo '#define __FAST__ 1'", compile):
        self.path, self.log = folder / "compiler", folder / "calls"
        self.path.write_text(
            f"#!/bin/sh\necho \"$*\" >> '{self.log}'\n"
            f'case "$*" in *-dM*) {describe}; exit;; esac\n'
            f'while [ "$1" != -o ]; do shift; done\n{compile}\n'
        )
        self.path.chmod(0o755)

    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def compiled(self):
        return sum("-shared" in call for call in self.calls())


@pytest.fixture
def library(monkeypatch):
    """What the real compiler makes of attention.cc."""
    require_kernels("attention")
    return native._compiled("attention", native._compiler())


@pytest.fixture
def compiler(library, tmp_path, monkeypatch):
    script = Script(tmp_path, compile=f"cp '{library}' \"$2\"")
    monkeypatch.setenv("CXX", str(script.path))
    return script


def warnings(caplog):
    return [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]


def test_a_library_is_compiled_once_for_all_processes(compiler, cache, monkeypatch):
    assert native.load("attention") and native.load("attention")
    load_anew(monkeypatch)
    assert native.load("attention")
    assert compiler.compiled() == 1
    assert len(list(cache.iterdir())) == 1


def test_what_a_killed_process_left_is_removed(compiler, cache):
    """And not what another process compiles at this moment."""
    for name, age in ((".compiling-left", 100_000), (".compiling-now", 60)):
        (cache / name).mkdir(parents=True)
        (cache / name / "half.so").touch()
        os.utime(cache / name, (time.time() - age,) * 2)
    assert native.load("attention")
    assert [path.name for path in cache.glob(".*")] == [".compiling-now"]
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("size", [0, 100, 4096, 20_000])
def test_a_library_that_was_cut_short_is_compiled_anew(size, compiler, cache, monkeypatch):
    assert native.load("attention")
    (path,) = cache.iterdir()
    cut = path.read_bytes()[:size]
    path.unlink()  # this process has it in memory, and would lose it
    path.write_bytes(cut)
    load_anew(monkeypatch)
    assert native.load("attention")
    assert compiler.compiled() == 2
    load_anew(monkeypatch)
    assert native.load("attention")
    assert compiler.compiled() == 2


def test_another_processor_gets_a_library_of_its_own(compiler, library, cache, monkeypatch):
    assert native.load("attention")
    Script(
        compiler.path.parent,
        describe="echo '#define __FASTER__ 1'",
        compile=f"cp '{library}' \"$2\"",
    )
    load_anew(monkeypatch)
    assert native.load("attention")
    assert compiler.compiled() == 2


def test_without_a_compiler_xla_s_operations_are_taken(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    as_one_device(monkeypatch)
    assert not native.load("attention") and not native.load("relations")
    assert not warnings(caplog)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)), jnp.float32)

    def attend(x, implementation):
        return dot_product_attention(
            x,
            x,
            x,
            segments=jnp.ones((2, 5), jnp.int32),
            heads=2,
            implementation=implementation,
        )

    function = functools.partial(attend, implementation="auto")
    assert calls(function, x) == 0
    # Both compiled, which fuses a scale into its product or does not.
    plain = functools.partial(attend, implementation="plain")
    np.testing.assert_array_equal(jax.jit(function)(x), jax.jit(plain)(x))


@pytest.mark.parametrize(
    "commands",
    [
        {"describe": "printf 'no \\377 licence' >&2; exit 1", "compile": "exit 1"},
        {"compile": "printf 'no \\377 licence' >&2; exit 1"},
    ],
    ids=["at once", "at the kernels"],
)
def test_what_a_failing_compiler_says_is_told_once(commands, cache, tmp_path, monkeypatch, caplog):
    """Be it in another encoding than ours."""
    script = Script(tmp_path, **commands)
    monkeypatch.setenv("CXX", str(script.path))
    assert not native.load("attention") and not native.load("attention")
    (message,) = warnings(caplog)
    assert str(script.path) in message and "attention.cc" in message
    assert message.endswith("no \N{REPLACEMENT CHARACTER} licence")
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("compile", [":", "echo no library > $2"], ids=["nothing", "no library"])
def test_a_compiler_that_makes_no_library_is_a_failing_one(
    compile, cache, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", str(Script(tmp_path, compile=compile).path))
    assert not native.load("attention")
    assert len(warnings(caplog)) == 1


def test_a_library_without_the_handlers_is_refused(compiler, cache, caplog):
    assert not native.load("relations")
    (message,) = warnings(caplog)
    assert "RelationLoss" in message


def test_the_compiler_named_may_have_options(compiler, cache, monkeypatch):
    monkeypatch.setenv("CXX", f"{compiler.path} --sysroot=/none")
    assert native.load("attention")
    assert all(call.startswith("--sysroot=/none ") for call in compiler.calls())


def test_it_can_be_switched_off(compiler, cache, monkeypatch):
    monkeypatch.setenv("MINILM_JAX_NATIVE", "0")
    assert not native.load("attention")
    assert compiler.calls() == []


@pytest.mark.parametrize("home", ["a file", "no folder", None])
def test_where_nothing_can_be_kept_it_is_compiled_for_this_process(
    home, compiler, cache, tmp_path, monkeypatch
):
    file = tmp_path / "a file"
    file.touch()
    if home is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv(
            "XDG_CACHE_HOME", {"a file": str(file), "no folder": "/dev/null/x"}[home]
        )
    kept = []
    monkeypatch.setattr(native, "_passing", kept)
    monkeypatch.setattr(
        native, "_passing_cache", functools.cache(native._passing_cache.__wrapped__)
    )
    assert native.load("attention")
    assert compiler.compiled() == 1
    (folder,) = kept
    assert len(list(Path(folder.name).iterdir())) == 1
    folder.cleanup()


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_two_processes_may_compile_at_once(library, tmp_path, monkeypatch):
    """Each waits for the other to have begun."""
    script = Script(
        tmp_path,
        compile='until [ $(grep -c shared "${0%/*}/calls") = 2 ]; do sleep 0.05; done\n'
        f"cp '{library}' \"$2\"",
    )
    settings = {"CXX": str(script.path), "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    code = "from minilm_jax import native; raise SystemExit(not native.load('attention'))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | settings) for _ in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert script.compiled() == 2
    assert len(list((tmp_path / "minilm_jax" / "native").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="options are GCC's")
@pytest.mark.parametrize("vectors", ["-march=x86-64", "-march=x86-64 -mavx2 -mfma"], ids=str)
def test_kernels_for_older_processors(vectors, tmp_path):
    """What this machine's processor is not, compiled for in its place and run."""
    if os.uname().machine != "x86_64":
        pytest.skip("options are those of x86-64")
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec g++ $(echo "$@" | sed s/-march=native/"{vectors}"/)\n')
    compiler.chmod(0o755)
    settings = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    tests = ["tests/encoder/test_dot_product_cpu.py", "tests/distill/test_relations_kernels.py"]
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-k", "cpu", *tests]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
    assert len(list((tmp_path / "minilm_jax" / "native").iterdir())) == 2
