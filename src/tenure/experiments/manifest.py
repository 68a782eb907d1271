"""What a job depends on, as a fingerprint: content of its program and inputs, library versions, machine class.

Content hashes are cached beside the home by (path, size, mtime), so that a large data set is read once, not at every run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tenure.errors import SpecError
from tenure.jobs import Job, ServerOptions, fingerprint
from tenure.nodes import Machine

MAX_FILES = 100_000
_MAX_CACHE_ENTRIES = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of an input: path relative to the input, size, content hash."""

    path: str
    size_bytes: int
    sha256: str


class Hasher:
    """Content hashes with a cache on disk. A file changed in place is seen by its size or mtime (nanoseconds)."""

    def __init__(self, cache: Path) -> None:
        self._cache_path = cache
        try:
            self._cache: dict[str, list[Any]] = json.loads(cache.read_text())
        except (OSError, ValueError):
            self._cache = {}  # a lost cache costs time, nothing else

    def sha256(self, path: Path) -> str:
        """Return the hex digest of a file's content."""
        stat = path.stat()
        key, mark = str(path.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._cache.get(key)
        if known and known[:3] == mark:
            return str(known[3])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._cache[key] = [*mark, digest]
        return digest

    def save(self) -> None:
        """Keep the cache for the next run; the newest entries when it has grown too large."""
        entries = dict(list(self._cache.items())[-_MAX_CACHE_ENTRIES:])
        draft = self._cache_path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(entries))
        draft.replace(self._cache_path)


def input_manifest(path: Path, hasher: Hasher) -> tuple[InputFile, ...]:
    """Return the files of an input, a file or a folder, sorted by path. Raises SpecError when it is missing or has too many."""
    if path.is_file():
        return (InputFile(path=path.name, size_bytes=path.stat().st_size, sha256=hasher.sha256(path)),)
    if not path.is_dir():
        raise SpecError(f"input {path} does not exist. Check [….inputs] in the job file; paths are relative to its folder.")
    files: list[InputFile] = []
    for found in sorted(p for p in path.rglob("*") if p.is_file()):
        if len(files) == MAX_FILES:
            raise SpecError(f"input {path} has more than {MAX_FILES:,} files; pack them into larger ones")
        relative = found.relative_to(path).as_posix()
        files.append(InputFile(path=relative, size_bytes=found.stat().st_size, sha256=hasher.sha256(found)))
    return tuple(files)


def job_fingerprint(
    job: Job,
    *,
    sources: Iterable[Path],
    inputs: Mapping[str, Path],
    versions: Mapping[str, str],
    machine: Machine,
    hasher: Hasher,
) -> str:
    """Return the fingerprint of a job: equal exactly when a trial of one says something about the other.

    sources: program files. inputs: resolved inputs by name. Goals, retries and names do not count; seed and shards do.
    """
    parts: dict[str, Any] = {
        "kind": job.kind,
        "runtime": job.runtime,
        "program": {path.name: hasher.sha256(path) for path in sources},
        "entry": job.program.partition(":")[2],
        "command": list(job.command),
        "work": [job.shards, job.batch, job.seed, dict(job.options), job.evaluate_every],
        "exchange": [job.same_result, job.exchange, job.local_steps, job.codec, job.outer_rate, job.outer_momentum],
        "inputs": {name: [[f.path, f.size_bytes, f.sha256] for f in input_manifest(p, hasher)] for name, p in inputs.items()},
        "versions": dict(versions),
        "machine": machine.machine_class,
    }
    if job.server != ServerOptions():  # what is left out leaves older trials their fingerprint
        parts["server"] = asdict(replace(job.server, host=""))
    hasher.save()
    return fingerprint(parts)
