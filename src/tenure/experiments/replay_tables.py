"""CSV tables whose every wrong value is told with file, line and column. Not here: what the columns mean."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tenure.errors import NotFound, SpecError
from tenure.resources import parse_bytes

Made = TypeVar("Made")
MAX_TABLE_BYTES = 1 << 30
"""A larger file is no trace that this machine could replay."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table, by column."""

    source: str
    line: int
    """1-based, the heading being line 1."""
    cells: dict[str, str]

    def error(self, column: str, message: str) -> SpecError:
        """Return the error that names file, line and column, for the caller to raise."""
        place = f"{self.source}:{self.line}: column {column}: " if column else f"{self.source}:{self.line}: "
        return SpecError(place + message)

    def text(self, column: str, default: str | None = None) -> str:
        """Return a cell; an empty or absent one gives the default. Raises SpecError when there is none."""
        found = (self.cells.get(column) or "").strip()
        if found:
            return found
        if default is None:
            raise self.error(column, "a value is needed; found none")
        return default

    def number(self, column: str, default: float | None = None, *, low: float = 0.0, above: bool = False) -> float:
        """Return a finite number of at least (above: more than) `low`. Raises SpecError."""
        if default is not None and not (self.cells.get(column) or "").strip():
            return default
        found = self.text(column)
        try:
            value = float(found)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low or (above and value == low):
            raise self.error(column, f"a number {'above' if above else 'of at least'} {low:g} was expected; found {found!r}")
        return value

    def whole(self, column: str, default: int | None = None, *, low: int = 0) -> int:
        """Return a whole number of at least `low`. Raises SpecError."""
        value = self.number(column, None if default is None else float(default), low=low)
        if value != math.floor(value):
            raise self.error(column, f"a whole number was expected; found {self.text(column)!r}")
        return int(value)

    def size(self, column: str, default: int | None = None) -> int:
        """Return bytes, from a whole number or a size such as 16GiB. Raises SpecError."""
        if default is not None and not (self.cells.get(column) or "").strip():
            return default
        return self.checked(column, lambda: parse_bytes(self.text(column)))

    def checked(self, column: str, make: Callable[[], Made]) -> Made:
        """Return what `make` gives; a SpecError of its gets file, line and column."""
        try:
            return make()
        except SpecError as error:
            if str(error).startswith(f"{self.source}:"):
                raise
            raise self.error(column, str(error)) from error


def read_text(path: Path) -> str:
    """Return a file's text. Raises NotFound, SpecError for a folder, a huge file or one that is not UTF-8."""
    if not path.exists():
        raise NotFound(f"{path} does not exist")
    if not path.is_file():
        raise SpecError(f"{path} is no file; a table of jobs or nodes was expected")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise SpecError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_TABLE_BYTES:,} are read. Replay a part of it.")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: byte {error.start}: UTF-8 text was expected; found something else") from error


def columns_of(text: str, path: Path) -> list[str]:
    """Return the columns that a table's first line names. Raises SpecError when there are none, or one is there twice."""
    found = [name.strip() for name in next(csv.reader(text.splitlines()[:1]), [])]
    if not any(found):
        raise SpecError(f"{path}:1: a line with the names of the columns was expected; found nothing")
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise SpecError(f"{path}:1: column {twice[0]} is there twice")
    return found


def rows_of(text: str, path: Path) -> Iterator[Row]:
    """Yield the lines of a table after its first. Raises SpecError for a line with too few or too many cells."""
    names = columns_of(text, path)
    lines = csv.reader(text.splitlines())
    next(lines)
    try:
        for cells in lines:
            if not cells or not any(cell.strip() for cell in cells):
                continue
            row = Row(str(path), lines.line_num, dict(zip(names, cells, strict=False)))
            if len(cells) != len(names):
                raise row.error("", f"{len(names)} cells were expected, as in line 1; found {len(cells)}")
            yield row
    except csv.Error as error:
        raise SpecError(f"{path}:{lines.line_num}: not a CSV line: {error}") from error


def distinct(rows: Iterable[Row], *columns: str) -> Iterator[Row]:
    """Yield the rows. Raises SpecError at one whose cells in these columns were there before."""
    seen: dict[tuple[str, ...], int] = {}
    for row in rows:
        key = tuple(row.text(column) for column in columns)
        if key in seen:
            raise row.error(columns[-1], f"{'/'.join(key)!r} is in line {seen[key]} already; it must differ")
        seen[key] = row.line
        yield row


def refuse_unknown(columns: Sequence[str], known: Sequence[str], path: Path) -> None:
    """Raise SpecError for a column that nobody reads: it may be a misspelt one that matters."""
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise SpecError(f"{path}:1: column {unknown[0]} is not known; known: {', '.join(known)}")
