"""Settings refuse what their annotations do not declare, in a sentence that names it."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest

from minilm_jax import cli
from minilm_jax.errors import ConfigError
from minilm_jax.settings import FINITE, Count, Positive, Rate, Settings, above, at_most, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Settings, name="inner"):
    steps: Positive = 6
    limit: Count | None = None
    rate: Rate = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Inner):
    output: Path = Path("runs/x")
    start: Literal["random", "teacher"] = "random"
    pairs: tuple[tuple[Literal["qk", "vv"], float], ...] = (("vv", 1.0),)
    share: Annotated[float, above(0), at_most(1), FINITE] = 0.5
    inner: Inner | None = None
    flag: bool = False
    anything: Any = None


class Forgotten(Inner):
    weight: float = 2.0


class Undeclared(Inner):
    weight = 2.0
    shared: ClassVar[int] = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Below(Forgotten):
    bias: float = 0.0


def test_settings_that_could_not_be_set_are_said():
    with pytest.raises(ConfigError, match=r"Forgotten has settings \(weight\) .*@dataclasses.data"):
        Forgotten(steps=3)
    with pytest.raises(ConfigError, match=r"Below has settings \(weight\) that nobody can set"):
        Below(bias=1.0)
    assert Undeclared(steps=3).weight == 2.0


@pytest.mark.parametrize(
    "given,message",
    [
        ({"output": "runs/x"}, "output is 'runs/x', expected a Path"),
        ({"steps": 6.0}, "steps is 6.0, expected an int"),
        ({"steps": True}, "steps is True, expected an int"),
        ({"flag": 1}, "flag is 1, expected a bool"),
        ({"rate": "1e-3"}, "rate is '1e-3', expected a float"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"limit": -1}, "limit must be at least 0, got -1"),
        ({"limit": "3"}, "limit is '3', expected an int"),
        ({"rate": 1.0}, "rate must be at least 0 and below 1, got 1.0"),
        ({"rate": math.nan}, "rate must be at least 0 and below 1, got nan"),
        ({"share": math.nan}, "share must be above 0 and at most 1 and finite, got nan"),
        (
            {"start": "techer"},
            "start is 'techer', which is none of random, teacher; did you mean 'teacher'?",
        ),
        ({"pairs": (("qk", 1.0), ("qs", 1.0))}, "pairs is 'qs', which is none of qk, vv"),
        ({"pairs": (("qk",),)}, "pairs is ('qk',), expected 2 values"),
        ({"pairs": "qk"}, "pairs is 'qk', expected a tuple"),
        ({"inner": 3}, "inner is 3, expected an Inner"),
    ],
)
def test_a_setting_that_is_not_what_it_is_declared_as_is_refused(given, message):
    Outer(inner=Inner(), rate=0.5, limit=3, anything=object())
    with pytest.raises(ConfigError, match=f"^{re.escape(f'inner.{message}')}$"):
        Outer(**given)


def test_a_value_too_long_to_be_read_is_cut_short():
    with pytest.raises(ConfigError, match=r"^inner.steps is \[0, 1, .{93}…, expected an int$"):
        Outer(steps=list(range(10_000)))


GIVEN_WRONGLY = """
import importlib
from minilm_jax import SentenceEncoder, cli
from minilm_jax.errors import ConfigError

calls = [(importlib.import_module(f"minilm_jax.jobs.{job}").run, {}) for job in cli.COMMANDS]
for call, given in [*calls, (SentenceEncoder, {"compute": "bf16"}), (SentenceEncoder, {})]:
    try:
        call(None, **given)
    except ConfigError as error:
        print(error)
"""


def test_what_is_given_from_python_is_checked_without_these_tests_checks():
    """In a process of its own: here beartype refuses what is of another type before we do."""
    done = subprocess.run(
        [sys.executable, "-c", GIVEN_WRONGLY], capture_output=True, text=True, check=True
    )
    *jobs, dtype, source = done.stdout.splitlines()
    assert len(jobs) == len(cli.COMMANDS)
    assert all(re.fullmatch(r"config is None, expected an? \w+Config", line) for line in jobs)
    assert dtype == "compute is 'bf16', expected a Compute"
    assert source == "source is None, expected a str"


def test_replacing_a_setting_checks_it_too():
    with pytest.raises(ConfigError, match=r"inner\.steps must be at least 1, got -3"):
        dataclasses.replace(Inner(), steps=-3)


def test_an_argument_is_checked_like_a_setting():
    check("dtype", "float32", Literal["float32", "bfloat16"])
    with pytest.raises(ConfigError, match=r"dtype is 'bf16', which is none of float32, bfloat16;"):
        check("dtype", "bf16", Literal["float32", "bfloat16"])


def test_every_options_help_fits_eighty_columns():
    """tyro keeps the line breaks of a field's docstring: a longer line would break twice."""
    for command in cli.COMMANDS.values():
        importlib.import_module(f"minilm_jax.jobs.{command.module}")
    classes, long = [Settings], []
    for one in classes:
        classes += one.__subclasses__()
        if not one.__module__.startswith("minilm_jax."):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        for field, said in itertools.pairwise(body.body):
            text = getattr(getattr(said, "value", None), "value", None)
            if isinstance(field, ast.AnnAssign) and isinstance(text, str) and "\n" in text:
                long += [line for line in text.split("\n") if len(line.strip()) > 70]
    assert len(classes) > 20 and not long
