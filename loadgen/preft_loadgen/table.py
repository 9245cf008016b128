"""Text for terminals: rows as an aligned table."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def printable(text: str) -> str:
    """`text` from a server, without characters that steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """`rows`, all of one length, as aligned columns: columns in `right` (numbers) are flush right, all others left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
