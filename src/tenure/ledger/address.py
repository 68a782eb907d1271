"""Where a ledger lies: a SQLite file of the home, or a PostgreSQL database. Cheap to import; opens nothing (`dialect`).

A home remembers an address that is not its own file in ``ledger-url``, readable by its owner only, since it may hold a
password. Printed, an address never shows one.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from tenure.errors import CorruptData, SpecError

FILE = "ledger.sqlite"
NOTE = "ledger-url"
_SCHEMES = ("postgresql", "postgres")
_HIDDEN = "***"


@dataclass(frozen=True, slots=True, repr=False)
class Address:
    """A SQLite file (`path`) or a PostgreSQL database (`url`); exactly one of them. `str` is for people."""

    path: Path | None = None
    url: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address of a PostgreSQL database. Raises SpecError for anything else."""
        try:
            parts = urlsplit(text)
            database, _ = unquote(parts.path).strip("/"), parts.port
        except ValueError as error:
            raise SpecError(f"the ledger's URL cannot be read: {error}. Write postgresql://USER@HOST/DATABASE") from error
        if parts.scheme not in _SCHEMES or not database or "/" in database:
            raise SpecError(
                f"a ledger is named postgresql://USER@HOST/DATABASE; found {_without_password(text)!r}. "
                "Without a name it is a file of the home."
            )
        return cls(url=urlunsplit(("postgresql", *parts[1:])))

    @property
    def has_password(self) -> bool:
        """Whether the URL itself says a password."""
        return bool(self.url) and (urlsplit(self.url).password is not None or "password=" in urlsplit(self.url).query)

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else _without_password(self.url)

    __repr__ = __str__


def _without_password(text: str) -> str:
    """Return a URL with its password, and a query that says one, hidden."""
    try:
        parts = urlsplit(text)
        secret = parts.password
    except ValueError:
        return _HIDDEN
    place = parts.netloc if secret is None else f"{parts.netloc.rpartition('@')[0].partition(':')[0]}:{_HIDDEN}@" + (
        parts.netloc.rpartition("@")[2]
    )  # fmt: skip
    query = _HIDDEN if "password=" in parts.query else parts.query
    return urlunsplit((parts.scheme, place, parts.path, query, ""))


def of_home(home: Path) -> Address:
    """Return where the home's ledger lies. Raises CorruptData when its note cannot be read."""
    note = home / NOTE
    try:
        return Address.parse(note.read_text().strip())
    except FileNotFoundError:
        return Address(path=home / FILE)
    except (OSError, ValueError, SpecError) as error:
        raise CorruptData(f"{note} should hold the ledger's URL: {error}") from error


def remember(home: Path, address: Address) -> None:
    """Have every later broker of the home use this ledger."""
    note = home / NOTE
    if address.path is not None:
        note.unlink(missing_ok=True)
    else:
        draft = home / f".{NOTE}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(address.url + "\n")
            stream.flush()
            os.fsync(descriptor)
        draft.replace(note)
    folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
