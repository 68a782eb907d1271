"""The file operations a training store is made of, and no others: those that NFS keeps.

Create-exclusive is a hard link onto the final name (`link` either makes it or finds it there; open with O_EXCL is not
safe on older NFS and would show a half-written file). Every operation is a method of `Files`, so that a test can end
the process at any of them. Not here: what the files mean (`store`).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path


class Files:
    """File operations below one folder that several processes share."""

    def publish(self, path: Path, pieces: Iterable[bytes | memoryview], *, durable: bool) -> bool:
        """Make `path` appear at once with this content. False when it is there already; then nothing changes.

        durable: written through to the disk first. Raises OSError, e.g. for a full disk; no partial file stays.
        """
        temp = self._temp(path)
        try:
            self._write(temp, pieces, durable)
            return self.link(temp, path)
        finally:
            self.remove(temp)

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytearray:
        """Return bytes of a file: `size` from `offset` on (-1: to its end), fewer when it ends before.

        Raises FileNotFoundError.
        """
        with open(path, "rb", buffering=0) as file:
            if size < 0:
                size = max(0, os.fstat(file.fileno()).st_size - offset)
            content, got = bytearray(size), 0
            with memoryview(content) as view:
                while got < size and (count := os.preadv(file.fileno(), [view[got:]], offset + got)):
                    got += count
        del content[got:]
        return content

    def replace(self, path: Path, content: bytes) -> None:
        """Set the content of `path` at once, whatever was there."""
        temp = self._temp(path)
        try:
            self._write(temp, [content], False)
            os.replace(temp, path)
        finally:
            self.remove(temp)

    def link(self, temp: Path, path: Path) -> bool:
        """Give `temp` its final name; False when the name is taken by another file."""
        try:
            os.link(temp, path)
        except FileExistsError:
            # A retransmitted NFS LINK whose first answer was lost reports EEXIST although it was ours.
            return os.stat(temp).st_nlink > 1
        return True

    def move(self, source: Path, target: Path) -> bool:
        """Rename; False when the source is gone."""
        try:
            os.rename(source, target)
        except FileNotFoundError:
            return False
        return True

    def remove(self, path: Path) -> None:
        """Remove a file; nothing happens when it is gone."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass

    def names(self, folder: Path, *, hidden: bool = False) -> list[str]:
        """Return the names in a folder, sorted; none when it does not exist. Hidden ones are unfinished files."""
        try:
            found = os.listdir(folder)
        except FileNotFoundError:
            return []
        return sorted(name for name in found if hidden or not name.startswith("."))

    def exists(self, path: Path) -> bool:
        """Return whether a finished file of this name is there."""
        return os.path.exists(path)

    def make_folder(self, path: Path) -> None:
        """Make a folder and its parents; nothing happens when it is there."""
        os.makedirs(path, exist_ok=True)

    def _temp(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")

    def _write(self, temp: Path, pieces: Iterable[bytes | memoryview], durable: bool) -> None:
        with open(temp, "xb") as file:
            for piece in pieces:
                file.write(piece)
            if durable:
                file.flush()
                os.fsync(file.fileno())
