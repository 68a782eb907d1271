"""Features that were computed once, on disk: one folder per key, filled piece by piece by whoever works on it.

    $TENURE_HOME/cache/features/<key>/
      x_train.npy  x_test.npy      all rows, then the CRC-32 of each piece; each appears at once, and is mapped
      pieces/x_train-00000012      a record of one batch of rows, until x_train.npy is there
      claims/x_train-00000012.0000 who computes the piece
      users/<process>              who maps the arrays: a folder in use is not removed
      used  quarantine/            when it was last opened; what did not match its checksum

Pieces are published create-exclusive: a killed worker loses the one it was at, and two that compute the same have one effect.
The arrays are mapped, unlike the records of a store: they are read by random rows, in every round, and are removed only when
no one uses them. Not here: what is computed (`features`), what the key is made of.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import random
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.errors import CorruptData, SpecError
from tenure.resources import show_bytes
from tenure.train.files import Files
from tenure.train.records import pack, read_arrays
from tenure.train.store import Claims

LIMIT_BYTES = 16 << 30
"""Of the folders of all keys together; the least recently used ones are removed."""
CHECKED_BYTES = 256 << 20
"""Of an array are compared with their checksums each time it is opened; of a larger one other pieces each time."""
UNMEASURED_S, SHORTEST_S, PATIENCE = 60.0, 5.0, 4.0
"""A claim on a piece lapses after PATIENCE times the longest one so far, SHORTEST_S at least; UNMEASURED_S before the first."""
ELSEWHERE_S = 6 * 3600.0
"""A process of another machine counts as a user for so long after it opened the arrays."""
_HASHED_AT_ONCE = 16 << 20
_MAX_MEMOS = 4096


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return where features are kept for a process with these variables: below TENURE_HOME, which all runs share.

    TENURE_HOME follows from TENURE_RUN_DIR (``$TENURE_HOME/runs/<run>/<stage>``) where it isn't set; a stage elsewhere keeps
    its own. Raises SpecError when neither is set.
    """
    home, stage = environment.get("TENURE_HOME"), environment.get("TENURE_RUN_DIR")
    if not home and stage:
        runs = Path(stage).parents[1]
        home = str(runs.parent) if runs.name == "runs" else stage
    if not home:
        raise SpecError("neither TENURE_HOME nor TENURE_RUN_DIR is set: hand a folder for the features to Frozen(folder=…)")
    return Path(home) / "cache" / "features"


def content_hash(values: NDArray[Any], root: Path, files: Files | None = None) -> str:
    """Return a hash of an array's dtype, shape and bytes.

    Of a mapped file it is noted below `root` by path, size, mtime and inode, so that the file is read once.
    """
    files = files or Files()
    memo = _memo(values, root)
    if memo is not None:
        try:
            return bytes(files.read(memo)).decode()
        except FileNotFoundError:
            pass
    digest = hashlib.blake2b(f"{values.dtype.str} {values.shape}".encode(), digest_size=32)
    step = max(1, _HASHED_AT_ONCE // max(1, values[:1].nbytes))
    for first in range(0, len(values), step):
        digest.update(np.ascontiguousarray(values[first : first + step]).reshape(-1).view(np.uint8).data)
    if memo is not None:
        files.make_folder(memo.parent)
        for name in names if len(names := files.names(memo.parent)) >= _MAX_MEMOS else ():
            files.remove(memo.parent / name)
        files.publish(memo, [digest.hexdigest().encode()], durable=False)
    return digest.hexdigest()


class Entry:
    """The folder of one key. Not shared between threads."""

    def __init__(self, root: Path, key: str, *, files: Files | None = None, limit_bytes: int = LIMIT_BYTES) -> None:
        self.root, self.key, self.folder = root, key, root / key
        self.files = files or Files()
        self.limit_bytes = limit_bytes
        self.longest_s = 0.0
        """Longest piece that this process has computed."""
        self._claims = Claims(self)
        self._me = _process()
        self.enter()

    def enter(self) -> None:
        """Make the folder, and note this process as its user. Again when it was removed just before that."""
        for name in ("pieces", "claims", "users", "quarantine"):
            self.files.make_folder(self.folder / name)
        self.files.publish(self.folder / "users" / self._me, [b""], durable=False)
        self.files.replace(self.folder / "used", b"")

    # --- whole arrays -------------------------------------------------------------------------------------------------

    def open(self, name: str, edges: Sequence[int]) -> NDArray[Any] | None:
        """Return an array, mapped; None when it isn't complete yet. One that does not match its checksums is set aside.

        edges: where each piece of it begins, and its number of rows. The sound pieces of a spoilt one are kept, so that only
        the others are computed again.
        """
        path = self.folder / f"{name}.npy"
        try:
            mapped: Any = np.load(path, mmap_mode="r", allow_pickle=False)
            size = os.stat(path).st_size
        except FileNotFoundError:
            return None
        except (ValueError, EOFError):
            self._set_aside(path)  # cut off within its header or rows
            return None
        table_at, pieces = mapped.offset + mapped.nbytes, len(edges) - 1
        if len(mapped) != edges[-1] or size != table_at + 4 * pieces:
            self._set_aside(path)
            return None
        table = np.frombuffer(self.files.read(path, table_at, 4 * pieces), dtype="<u4")
        numbers, looked_at = list(range(pieces)), 0
        random.shuffle(numbers)
        for number in numbers:
            first, stop = (mapped.offset + edge * mapped[:1].nbytes for edge in edges[number : number + 2])
            if zlib.crc32(self.files.read(path, first, stop - first)) != table[number]:
                self._salvage(name, mapped, table, edges)
                return None
            looked_at += stop - first
            if looked_at >= CHECKED_BYTES:
                break
        return np.asarray(mapped)

    def assemble(self, name: str, edges: Sequence[int]) -> None:
        """Make an array of its pieces; they are removed then. Raises CorruptData for a piece, which is set aside."""
        self.files.publish(self.folder / f"{name}.npy", self._assembled(name, edges), durable=False)
        self.tidy(name)

    def tidy(self, name: str) -> None:
        """Remove the pieces and claims of an array that is there, and what killed writers left."""
        for folder in ("pieces", "claims"):
            for one in self.files.names(self.folder / folder, hidden=True):
                if one.lstrip(".").startswith(f"{name}-"):
                    self.files.remove(self.folder / folder / one)

    def _assembled(self, name: str, edges: Sequence[int]) -> Iterator[bytes | memoryview]:
        table = []
        for number in range(len(edges) - 1):
            values = self._piece(name, number)
            if number == 0:
                yield _npy_header(values.dtype, (edges[-1], *values.shape[1:]))
            content = values.reshape(-1).view(np.uint8).data
            table.append(zlib.crc32(content))
            yield content
        yield np.array(table, dtype="<u4").tobytes()

    def _salvage(self, name: str, mapped: NDArray[Any], table: NDArray[Any], edges: Sequence[int]) -> None:
        """Set an array aside and publish those of its pieces that match their checksums."""
        for number, expected in enumerate(table.tolist()):
            part = np.array(mapped[edges[number] : edges[number + 1]])
            if zlib.crc32(part.reshape(-1).view(np.uint8).data) == expected:
                self.publish(name, number, part)
        self._set_aside(self.folder / f"{name}.npy")

    # --- pieces -------------------------------------------------------------------------------------------------------

    def pieces(self, name: str) -> set[int]:
        """Return the numbers of the pieces of an array that are there."""
        return {int(n.rpartition("-")[2]) for n in self.files.names(self.folder / "pieces") if n.startswith(f"{name}-")}

    def publish(self, name: str, number: int, values: NDArray[Any]) -> bool:
        """Publish a piece; False when it is there."""
        path = self.folder / "pieces" / f"{name}-{number:08d}"
        return self.files.publish(path, pack({"x": values}), durable=False)

    def claim(self, name: str, number: int, now_s: float) -> bool:
        """Return whether this process may do piece `number` now; -1 means the assembling. Ask again while it isn't done."""
        what = f"{name}-{number:08d}"
        period_s = max(SHORTEST_S, PATIENCE * self.longest_s) if self.longest_s else UNMEASURED_S
        taken = [one for one in self.names("claims") if one.startswith(f"{what}.")]
        if taken and self._is_free(taken[-1]):
            period_s = 0.0
        return self._claims.claim(what, self._me, now_s=now_s, period_s=period_s)

    def names(self, folder: str) -> list[str]:
        """Return the finished files of a subfolder, sorted (for `Claims`)."""
        return self.files.names(self.folder / folder)

    def publish_json(self, name: str, data: Any) -> bool:
        """Publish a small document; False when the name is taken (for `Claims`)."""
        return self.files.publish(self.folder / name, [json.dumps(data).encode()], durable=False)

    def _piece(self, name: str, number: int) -> NDArray[Any]:
        path = self.folder / "pieces" / f"{name}-{number:08d}"
        try:
            return read_arrays(path, self.files)[1]["x"]
        except CorruptData:
            self._set_aside(path)
            raise

    def _is_free(self, claim: str) -> bool:
        """Return whether a claim is of a process that has ended, or of an earlier turn of this one."""
        try:
            owner = json.loads(bytes(self.files.read(self.folder / "claims" / claim)))["owner"]
        except (FileNotFoundError, ValueError):
            return False
        return owner == self._me or _alive(str(owner)) is False

    def _set_aside(self, path: Path) -> None:
        self.files.move(path, self.folder / "quarantine" / f"{path.name}.{secrets.token_hex(4)}")

    # --- the bound ----------------------------------------------------------------------------------------------------

    def make_room(self, needed_bytes: int) -> None:
        """Remove what was longest not used until so many bytes more fit. Raises SpecError when the rest is in use."""
        others = sorted(
            (_mtime_s(self.root / key / "used"), key)
            for key in self.files.names(self.root)
            if key != self.key and not self._in_use(self.root / key)
        )
        total = sum(_bytes_of(self.root / key) for key in self.files.names(self.root))
        for _, key in others:
            if total + needed_bytes <= self.limit_bytes:
                break
            total -= _bytes_of(self.root / key)
            gone = self.root / f".removed-{key}-{secrets.token_hex(4)}"
            if self.files.move(self.root / key, gone):
                shutil.rmtree(gone, ignore_errors=True)
        if total + needed_bytes > self.limit_bytes:
            raise SpecError(
                f"the features need {show_bytes(needed_bytes)} for a while in {self.root}; its limit is "
                f"{show_bytes(self.limit_bytes)}, and {show_bytes(total)} there are in use. Raise limit_bytes of Frozen, or "
                "wait until other runs have ended."
            )

    def _in_use(self, folder: Path) -> bool:
        used = False
        for user in self.files.names(folder / "users"):
            alive = _alive(user)
            if alive is None:  # of another machine: by the file system's own clock, not by ours
                alive = _mtime_s(self.folder / "used") - _mtime_s(folder / "users" / user) < ELSEWHERE_S
            if not alive:
                self.files.remove(folder / "users" / user)
            used = used or alive
        return used


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(out, described)
    return out.getvalue()


def _memo(values: NDArray[Any], root: Path) -> Path | None:
    """Return where the hash of a mapped array is noted; None for an array in memory, or a part of a file."""
    path = getattr(values, "filename", None)
    if path is None or not isinstance(values.base, mmap.mmap):
        return None
    status = os.stat(path)
    where = f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ino} {values.dtype.str} {values.shape}"
    return root / ".hashes" / hashlib.sha256(where.encode()).hexdigest()


def _process() -> str:
    """Return a name of this process that no other one has, on any machine."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    space = os.stat("/proc/self/ns/pid").st_ino
    return f"{boot}-{space}-{os.getpid()}-{_started(os.getpid())}"


def _alive(process: str) -> bool | None:
    """Return whether a process lives; None when it belongs to another machine or container."""
    boot, space, pid, started = process.split("-")
    if not _process().startswith(f"{boot}-{space}-"):
        return None
    return _started(int(pid)) == int(started)


def _started(pid: int) -> int:
    """Return when a process of this machine began, in clock ticks (proc(5), stat field 22); -1 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError):
        return -1


def _mtime_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _bytes_of(folder: Path) -> int:
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.stat(os.path.join(place, name)).st_blocks * 512
            except OSError:
                pass  # removed meanwhile
    return found
