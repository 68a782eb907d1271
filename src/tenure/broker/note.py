"""What a broker leaves for one that comes after its death: its nodes, whether it stays, how nodes confine, its
queue's order, where its metrics are read.

A broker that leaves on purpose, with no lease left, takes the note with it. Not here: leases and runs (`ledger`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tenure.errors import CorruptData
from tenure.fleet.contract import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One broker, as it was told to be."""

    parts: tuple[Part, ...] = ()
    persistent: bool = False
    confine: str = "auto"
    order: str = "fifo"
    metrics_port: int = 0
    """0: nowhere."""


def read_note(home: Path) -> Note | None:
    """Return the note of an earlier broker, None when it left none. Raises CorruptData when it cannot be read."""
    path = home / "broker.json"
    try:
        kept = json.loads(path.read_text())
        return Note(
            parts=tuple(Part.parse(text) for text in kept["nodes"]),
            persistent=bool(kept["persistent"]),
            confine=str(kept["confine"]),
            order=str(kept.get("order", "fifo")),  # older notes have none
            metrics_port=int(kept.get("metrics_port", 0)),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptData(f"{path} should hold nodes, persistent and confine: {error!r}. Remove it and try again.") from error


def write_note(home: Path, note: Note) -> None:
    """Replace the note, at once and to survive a power cut. Raises OSError."""
    draft = home / ".broker.json"
    with draft.open("w") as stream:
        said = {
            "persistent": note.persistent,
            "confine": note.confine,
            "order": note.order,
            "metrics_port": note.metrics_port,
        }
        json.dump({"nodes": [str(part) for part in note.parts], **said}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(home / "broker.json")


def remove_note(home: Path) -> None:
    """Remove the note, if there is one."""
    (home / "broker.json").unlink(missing_ok=True)
