"""What of the text was left out, and of which files."""

from collections import Counter
from dataclasses import dataclass, field

_NAMED = 3


@dataclass
class Skipped:
    """What was left out, counted by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    files: dict[str, list[str]] = field(default_factory=dict)
    """The first files that something was left out of, by reason; one more than is shown."""

    def add(self, reason: str, count: int, files: list[str]) -> None:
        """Counts what files have of it."""
        self.counts[reason] += count
        self.name(reason, files)

    def name(self, reason: str, files: list[str]) -> None:
        """Takes down files of which something was counted; it may be the same one again."""
        named = dict.fromkeys([*self.files.get(reason, ()), *files])
        self.files[reason] = list(named)[: _NAMED + 1]

    def update(self, other: "Skipped") -> None:
        """Adds what was left out elsewhere."""
        for reason, count in other.counts.items():
            self.add(reason, count, other.files.get(reason, []))

    def lines(self) -> list[str]:
        """Returns a line a reason, such as "51 broken utf-8: a.txt, b.txt"."""
        return [
            f"{count:,} {reason}{self._shown(reason)}"
            for reason, count in sorted(self.counts.items())
        ]

    def _shown(self, reason: str) -> str:
        files = self.files.get(reason, [])
        more = ["…"] if len(files) > _NAMED else []
        return f": {', '.join([*files[:_NAMED], *more])}" if files else ""
