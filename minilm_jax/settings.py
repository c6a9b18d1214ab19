"""Settings that check themselves: a value of a wrong type, choice or range is refused at once.

Types alone would not do: options of the command line are parsed by them, but what stands in a
Python file is taken as it is. A text in the place of a path would fail far from here, and a choice
that is none would be taken for another.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from minilm_jax.errors import ConfigError

T = TypeVar("T")


class Bound(NamedTuple):
    """What a number must be, beside its type: `Annotated[float, at_least(0), below(1)]`."""

    words: str
    holds: Callable[[float], bool]
    """False for NaN."""


def at_least(least: int) -> Bound:
    """Returns the bound of numbers from `least` on."""
    return Bound(f"at least {least:,}", lambda value: value >= least)


def above(limit: int) -> Bound:
    """Returns the bound of numbers larger than `limit`."""
    return Bound(f"above {limit:,}", lambda value: value > limit)


def at_most(most: int) -> Bound:
    """Returns the bound of numbers up to `most`."""
    return Bound(f"at most {most:,}", lambda value: value <= most)


def below(limit: int) -> Bound:
    """Returns the bound of numbers smaller than `limit`."""
    return Bound(f"below {limit:,}", lambda value: value < limit)


FINITE = Bound("finite", math.isfinite)
Positive = Annotated[int, at_least(1)]
Count = Annotated[int, at_least(0)]
Rate = Annotated[float, at_least(0), below(1)]
Share = Annotated[float, at_least(0), at_most(1)]
Weight = Annotated[float, at_least(0), FINITE]


class Settings:
    """The base of dataclasses whose fields are checked against their annotations when one is made.

    A subclass with a `__post_init__` of its own calls this one first. `class A(Settings, name="a")`
    has its fields called `a.field` in what is said.
    """

    _name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name is not None:
            cls._name = f"{name}."

    def __post_init__(self) -> None:
        declared = get_type_hints(type(self), include_extras=True)
        fields: Any = self  # a dataclass, as every subclass is
        known = {field.name for field in dataclasses.fields(fields)}
        stray = [name for name in declared if name not in known and not _of_class(declared[name])]
        if stray:
            raise ConfigError(
                f"{type(self).__name__} has settings ({', '.join(stray)}) that nobody can set: "
                "write @dataclasses.dataclass(frozen=True, kw_only=True) above each class"
            )
        for field in dataclasses.fields(fields):
            check(self._name + field.name, getattr(self, field.name), declared[field.name])


def _of_class(declared: Any) -> bool:
    return declared is ClassVar or get_origin(declared) is ClassVar


def over(own: T, options: Any) -> T:
    """Returns settings with those options in their place that are given.

    Args:
      own: a dataclass.
      options: a dataclass of the same fields; None is not given.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    return cast(T, dataclasses.replace(cast(Any, own), **given))


def check_distinct(name: str, values: Sequence[Any], *, each: str = "") -> None:
    """Raises ConfigError where a value stands twice.

    Args:
      name: of the setting, for the sentence.
      values: what it was given.
      each: what one value stands for, where the name does not tell.
    """
    if len(set(values)) < len(values):
        shown = ", ".join(map(str, values))
        raise ConfigError(f"{name} has a value twice ({shown}); {each}give each once")


def check(name: str, value: Any, declared: Any) -> None:
    """Raises ConfigError where a value is not what its annotation declares.

    Args:
      name: of the setting, for the sentence.
      value: what it was given.
      declared: a class, Literal, union, tuple of these, or any of them Annotated with bounds;
        what else there is of types is not looked into.
    """
    complaint = _complaint(value, declared)
    if complaint:
        raise ConfigError(name + complaint)


def _complaint(value: Any, declared: Any) -> str:
    """Returns what is wrong with a value, to stand behind its name; "" where nothing is."""
    kind, parts = get_origin(declared), get_args(declared)
    if kind is Annotated:
        bounds = [part for part in parts[1:] if isinstance(part, Bound)]
        misfit = _complaint(value, parts[0])
        if misfit or all(bound.holds(value) for bound in bounds):
            return misfit
        return f" must be {' and '.join(bound.words for bound in bounds)}, got {value}"
    if kind in (Union, types.UnionType):
        complaints = [_complaint(value, part) for part in parts]
        return complaints[0] if all(complaints) else ""
    if kind is Literal:
        known = value in parts
        return "" if known else f" is {_shown(value)}, which is none of {_listed(value, parts)}"
    if kind is tuple and isinstance(value, tuple):
        each = parts[:1] * len(value) if parts[-1:] == (...,) else parts
        if len(value) != len(each):
            return f" is {_shown(value)}, expected {len(each)} values"
        complaints = [_complaint(one, wanted) for one, wanted in zip(value, each, strict=True)]
        return next(filter(None, complaints), "")
    wanted = kind or declared
    if wanted is Any or not isinstance(wanted, type):
        return ""
    fits = isinstance(value, (int, float) if wanted is float else wanted)
    # To Python True is an int.
    if fits and not (isinstance(value, bool) and wanted in (int, float)):
        return ""
    article = "an" if wanted.__name__[0].lower() in "aeiou" else "a"
    return f" is {_shown(value)}, expected {article} {wanted.__name__}"


def _shown(value: Any) -> str:
    """Returns what tells a value: a model's repr would be all its weights."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _listed(value: Any, choices: tuple[Any, ...]) -> str:
    texts = [str(choice) for choice in choices]
    close = get_close_matches(str(value), texts, n=1)
    return ", ".join(texts) + (f"; did you mean {close[0]!r}?" if close else "")
