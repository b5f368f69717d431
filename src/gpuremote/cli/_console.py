"""What the commands print for people: tables on a terminal, plain columns elsewhere.

Much of it comes from a server: names, models, reasons. None of that may steer a terminal or be
read as markup.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["printable", "say", "show", "size"]


def printable(text: object) -> str:
    """``text`` with everything that a terminal would act upon written out, line ends apart."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def size(nbytes: int) -> str:
    """Bytes in the unit that suits them."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def say(text: object) -> None:
    """Print one line, never broken in the middle."""
    print(_line(text))


def show(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; without lines or colours where standard output is no terminal."""
    body = [[_line(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        table = Table(*columns)
        for row in body:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *body, strict=True)]
    for row in [list(columns), *body]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _line(text: object) -> str:
    return printable(text).replace("\n", "; ")
