"""Which lengths share a row: best-fit decreasing over the histogram of lengths.

Working on the histogram instead of the documents makes the cost depend on the row length alone
(Krell et al. 2021, "Efficient sequence packing without cross-contamination"), and the number of
rows the same in every epoch.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Pattern:
    """Rows that hold pieces of the same lengths."""

    lengths: tuple[int, ...]
    rows: int


def pack(histogram: Int[np.ndarray, "lengths"], *, capacity: int) -> list[Pattern]:
    """Returns patterns that hold every piece once.

    Args:
        histogram: Number of pieces of each length 0, …, capacity; none of length 0.
        capacity: Tokens of a row.
    """
    # Rows still open, by the room they have left; bit r of `rooms` says that there are some.
    open_rows: dict[int, list[Pattern]] = {}
    rooms = 0
    full: list[Pattern] = []

    def put(lengths: tuple[int, ...], rows: int, room: int) -> None:
        nonlocal rooms
        if room == 0:
            full.append(Pattern(lengths, rows))
            return
        open_rows.setdefault(room, []).append(Pattern(lengths, rows))
        rooms |= 1 << room

    for length in range(capacity, 0, -1):
        left = int(histogram[length])
        while left:
            fitting = rooms >> length
            if not fitting:
                per_row = capacity // length
                if whole := left // per_row:
                    put((length,) * per_row, whole, capacity - per_row * length)
                if rest := left % per_row:
                    put((length,) * rest, 1, capacity - rest * length)
                break
            room = length + (fitting & -fitting).bit_length() - 1
            pattern = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
            taken = min(left, pattern.rows)
            left -= taken
            put((*pattern.lengths, length), taken, room - length)
            if pattern.rows > taken:
                put(pattern.lengths, pattern.rows - taken, room)
    rest_of = [pattern for patterns in open_rows.values() for pattern in patterns]
    return _merged([*full, *rest_of])


def _merged(patterns: list[Pattern]) -> list[Pattern]:
    rows: dict[tuple[int, ...], int] = {}
    for pattern in patterns:
        rows[pattern.lengths] = rows.get(pattern.lengths, 0) + pattern.rows
    return [Pattern(lengths, count) for lengths, count in sorted(rows.items(), reverse=True)]
