"""The unit of text that every source yields and no stage below ever merges with another."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text with its own beginning and end."""

    text: str
    """Unicode text, never empty when a source yields it."""
    language: str = ""
    """Language code, or "" where nobody said."""
    origin: str = ""
    """Where it came from, for messages: a path and a position in it."""
