"""How a noun becomes JSON and comes back, and how an error does: the one place where that is done.

What goes over a socket (`wire`), into the ledger's rows and into the files of a runtime is written by these few functions.
Not here: which nouns are said to whom (`wire`), sockets (`sockets`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from tenure import errors
from tenure.errors import CorruptData, TenureError

T = TypeVar("T")


def to_json(noun: Any) -> bytes:
    """Return a noun, or plain data, as one line of JSON without the newline."""
    return msgspec.json.encode(noun)


def to_builtins(noun: Any) -> Any:
    """Return a noun as plain dicts, lists, strings and numbers."""
    return msgspec.to_builtins(noun)


def from_json(data: bytes | str, kind: type[T]) -> T:
    """Return the noun that the JSON describes. Raises CorruptData when it does not fit `kind`."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError) as error:
        raise CorruptData(f"not a valid {kind.__name__}: {error}") from error


def from_builtins(data: Any, kind: Any) -> Any:
    """Return the noun that plain data describes. `kind` may be any type form. Raises CorruptData when it does not fit."""
    try:
        return msgspec.convert(data, type=kind)
    except (msgspec.MsgspecError, ValueError) as error:
        raise CorruptData(f"not a valid {getattr(kind, '__name__', kind)}: {error}") from error


def error_to_wire(error: TenureError) -> dict[str, Any]:
    """Return an error as plain data: its class name, its text, and its own fields."""
    details = {k: v for k, v in vars(error).items() if isinstance(v, (str, int, float, bool, dict))}
    return {"kind": type(error).__name__, "message": str(error), "details": details}


def error_from_wire(data: Mapping[str, Any]) -> TenureError:
    """Return the error that the other side raised; an unknown class becomes its base."""
    kind = getattr(errors, str(data.get("kind")), TenureError)
    if not (isinstance(kind, type) and issubclass(kind, TenureError)):
        kind = TenureError
    error = kind.__new__(kind)
    Exception.__init__(error, str(data.get("message", "no reason given")))
    for name, value in dict(data.get("details") or {}).items():
        setattr(error, name, value)
    return error
