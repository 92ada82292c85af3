"""Tables for the terminal and for Markdown from the same columns, and numbers written for people."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.table import Table

__all__ = ["Column", "bytes_of", "count_of", "relative", "to_markdown", "to_text"]

Row = TypeVar("Row")

_NOTHING = "-"
_WIDE = 400  # characters; a table is never broken, whoever shows it decides what to do with long lines


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column: its title, and what it says of a row. The first column of a table is a name, the others numbers."""

    title: str
    cell: Callable[[Row], str]


def to_text(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> str:
    """A plain table for the terminal.

    >>> print(to_text([Column("name", str), Column("square", lambda n: str(n * n))], [2, 10]))
    name  square
    2          4
    10       100
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True, header_style="")
    for i, column in enumerate(columns):
        table.add_column(column.title, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    out = io.StringIO()
    Console(file=out, width=_WIDE, color_system=None, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))


def to_markdown(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> str:
    """The same in Markdown.

    >>> print(to_markdown([Column("name", str), Column("square", lambda n: str(n * n))], [2, 10]))
    | name | square |
    |---|--:|
    | 2 | 4 |
    | 10 | 100 |
    """
    titles = [column.title for column in columns]
    lines = [titles, *([column.cell(row).replace("|", "\\|") for column in columns] for row in rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|---|" + "--:|" * (len(columns) - 1), *text[1:]])


def count_of(n: float | None) -> str:
    """A number of parameters or products.

    >>> [count_of(n) for n in (None, 950, 134_515_008, 6.7e9)]
    ['-', '950', '134.5M', '6.70G']
    """
    if n is None:
        return _NOTHING
    for unit, factor, digits in (("T", 1e12, 2), ("G", 1e9, 2), ("M", 1e6, 1), ("k", 1e3, 1)):
        if abs(n) >= factor:
            return f"{n / factor:,.{digits}f}{unit}"
    return f"{n:,.0f}"


def bytes_of(n: float | None) -> str:
    """A number of bytes, in powers of 1024.

    >>> [bytes_of(n) for n in (None, 100, 46080, 538_090_408, 2**33)]
    ['-', '100 B', '45.0 KiB', '513.2 MiB', '8.00 GiB']
    """
    if n is None:
        return _NOTHING
    for unit, factor, digits in (("TiB", 2**40, 2), ("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if abs(n) >= factor:
            return f"{n / factor:,.{digits}f} {unit}"
    return f"{n:,.0f} B"


def relative(value: float, to: float) -> str:
    """A factor.

    >>> relative(3.0, 2.0)
    '1.50x'
    """
    return f"{value / to:.2f}x" if to else _NOTHING
