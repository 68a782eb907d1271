"""The lock file of a closure: JSON in which every file has a line of its own, so that two closures differ line by line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from tenure.closures import Closure, ClosureFile, SystemCall
from tenure.errors import CorruptData, NotFound, SpecError

FORMAT = 1
"""Raised when a lock file of this version can't be read by the one before."""


def write_lock(closure: Closure, path: Path) -> None:
    """Write the lock file, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(lock_text(closure), encoding="utf-8", errors="surrogateescape")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_lock(path: Path) -> Closure:
    """Return the closure that a lock file holds. Raises NotFound; CorruptData when it is not what was written."""
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        raise NotFound(f"no lock file of a closure at {path}") from None
    return parse_lock(text, source=str(path))


def lock_text(closure: Closure) -> str:
    """Return the lock file's text. The same closure always gives the same text."""
    head = {
        "format": FORMAT,
        "hash": closure.hash,
        "program": closure.program,
        "workdir": closure.workdir,
        "env": dict(sorted(closure.env.items())),
        "machine": closure.machine,
        "python": closure.python,
        "made_at_s": closure.made_at_s,
    }
    lines = [f"{_json(key)}: {_json(value)}" for key, value in head.items()]
    lines += [_list("exercises", closure.exercises), _list("system_calls", closure.system_calls), _list("files", closure.files)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def parse_lock(text: str, *, source: str = "lock file") -> Closure:
    """Return the closure that this text says. Raises CorruptData when its hash is not that of what it lists."""
    try:
        fields = json.loads(text)
        found, stated = fields.pop("format"), fields.pop("hash")
        if found != FORMAT:
            raise CorruptData(f"{source}: lock format {found}; this version reads {FORMAT}: analyse the program again")
        fields["files"] = [_restored(file) for file in fields["files"]]
        closure = msgspec.convert(fields, Closure)
    except (msgspec.MsgspecError, SpecError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise CorruptData(f"{source} is not the lock file of a closure: {error}. Analyse the program again.") from error
    if closure.hash != stated:
        raise CorruptData(
            f"{source}: it says hash {stated}, its files give {closure.hash}. It was edited or cut: analyse the program again."
        )
    return closure


def _list(key: str, items: tuple[Any, ...]) -> str:
    rows = ",\n".join(f"  {_json(_slim(item))}" for item in items)
    return f"{_json(key)}: [\n{rows}\n]" if rows else f"{_json(key)}: []"


def _slim(item: Any) -> dict[str, Any]:
    """Return the noun's fields without those that say nothing; a file's mode in octal, as people read it."""
    fields: dict[str, Any] = msgspec.to_builtins(item)
    if isinstance(item, ClosureFile):
        fields["mode"] = f"{item.mode:04o}"
        fields["reasons"] = [[reason.kind, reason.detail] if reason.detail else [reason.kind] for reason in item.reasons]
    keep = {"count", "exit_code", "argv"} if not isinstance(item, (ClosureFile, SystemCall)) else {"count"}
    return {key: value for key, value in fields.items() if value or key in keep}


def _restored(fields: dict[str, Any]) -> dict[str, Any]:
    reasons = [{"kind": reason[0], "detail": reason[1] if len(reason) > 1 else ""} for reason in fields.get("reasons", [])]
    return {**fields, "mode": int(fields["mode"], 8), "reasons": reasons}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))  # not msgspec: a name on disk need not be UTF-8
